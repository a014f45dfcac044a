"""Errors of the user's input as one line on stderr, on every rank."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from distopt.failures import FileError, LostRank
from distopt.job.restart import earlier_end, tell_launcher
from distopt.job.stop import SIGNALS, STOPPED, Stopped


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError, a file that cannot be read or written, or a lost rank into one line on stderr and exit code
    1.

    HYDRA_FULL_ERROR=1 shows the traceback instead. `Stopped` ends every process with an exit code of its own, and with
    a line from the first process; Ctrl-C in a program that has nothing to save is a line, and exit code 130.
    """
    first = os.environ.get("RANK") in (None, "0")
    try:
        yield
    except Stopped as stopped:
        _end(f"distopt: stopped: {stopped}", STOPPED, quiet=not first, final=True)
    except KeyboardInterrupt:
        _end("\ndistopt: interrupted", 130, quiet=not first)
    except (ValueError, OSError, FileError, LostRank) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        _end(_line(str(error)), 1, final=isinstance(error, ValueError))


def end_from_thread(message: str) -> NoReturn:
    """Ends the process with a line from a thread, while the main thread waits for something that may not come."""
    sys.stderr.write(f"\n{_line(message)}\n")
    sys.stderr.flush()
    tell_launcher(_line(message), int(time.time()), None)
    os._exit(1)


def _line(message: str) -> str:
    who = "distopt" if os.environ.get("RANK") in (None, "0") else f"distopt (rank {os.environ['RANK']})"
    return f"{who}: error: {' '.join(message.split()).removeprefix('distopt: error: ')}"  # of a sweep's job


def _end(line: str, code: int, quiet: bool = False, final: bool = False) -> NoReturn:
    """Ends the process; `final` where it would end so again, so that no other attempt may follow."""
    # The launcher terminates the other ranks as soon as one exits, while they are exiting with the same code. Without a
    # launcher the process may be a notebook, which lives on, and hands what it ignores to the processes that it starts.
    if "RANK" in os.environ:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if not quiet:
        # In one write: `print` writes the newline separately, and another rank's line may come in between.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    tell_launcher(line, int(time.time()), code if final else None)
    if _has_joined():
        # Without shutdown: gloo aborts a process that closes its connections after another one has ended.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _has_joined() -> bool:
    """Whether this process has others; without torch, which takes seconds to import, it has none."""
    if "torch.distributed" not in sys.modules:
        return False
    from distopt import collective

    return collective.world() > 1


def end_as_before() -> None:
    """Ends this process if it is another attempt at a job whose end was final: one that was refused or stopped."""
    if (end := earlier_end()) is not None:
        _end(end.line, end.code, quiet=True, final=True)
