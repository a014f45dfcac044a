"""How a process of a job ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def end_of_process() -> Iterator[None]:
    """Around all that a process does: it ends here, with the code that was asked for, else 0; other exceptions pass.

    It ends as multiprocessing's children do: threads are waited for and what was registered with atexit runs, but the
    interpreter is not taken down. While that happens, a worker of gloo that lets go of a tensor aborts the process
    (torch 2.13 with CPython before 3.14, pytorch#179291), and a job that had finished would be one that failed.
    `destroy_process_group` ends those workers only where nothing refers to a group any more, and DeviceMeshes, the
    caches of DTensor and DeepSpeed do so for ever.
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


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process at once, with exit code 130 and a line of the first one.

    A KeyboardInterrupt would come too late in a rank that waits for another: that has gone, which is the error shown.
    """
    if os.environ.get("RANK") not in (None, "0"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the middle of a collective too
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.stdout.flush()
        os.write(2, b"\ndistopt: interrupted; train.resume=auto resumes from the last checkpoint\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
