"""The end of a job's process: with its launcher, by Ctrl-C, and without taking the interpreter down."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def end_of_process() -> Iterator[None]:
    """Ends the process after its body, with the exit code of a SystemExit or else 0; other exceptions propagate.

    The process ends as multiprocessing's children do: it waits for threads and runs the functions registered with
    atexit, but does not finalize the interpreter. During finalization, a worker of gloo that releases a tensor aborts
    the process (torch 2.13 with CPython before 3.14, pytorch#179291), and a finished job would count as failed.
    `destroy_process_group` ends those workers only when nothing refers to a group any more, while DeviceMeshes, the
    caches of DTensor and DeepSpeed always do.
    """
    code: object = None
    try:
        yield
    except SystemExit as end:
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def end_with_launcher() -> None:
    """Has the kernel send this process SIGTERM when its launcher dies, however that happens (Linux only).

    Without it the processes of a launcher that was killed would train on, and a second job would find their run's
    folder in use.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def end_on_interrupt(tidy: Callable[[], None] = lambda: None) -> None:
    """Makes Ctrl-C end this process at once, with exit code 130 and a line from the first process.

    A rank that waits for another one would see KeyboardInterrupt too late, after an error about the lost connection.

    Args:
        tidy: Called by the first process before it ends.
    """
    if os.environ.get("RANK") not in (None, "0"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the middle of a collective too
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.stdout.flush()
        tidy()
        os.write(2, b"\ndistopt: interrupted; train.resume=auto resumes from the last checkpoint\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
