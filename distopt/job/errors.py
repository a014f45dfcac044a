"""Errors of the user's input as one line on stderr, on every rank."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from distopt import collective
from distopt.job.stop import SIGNALS, STOPPED, Stopped


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError, or a file that cannot be read or written, into one line on stderr and exit code 1.

    HYDRA_FULL_ERROR=1 shows the traceback instead. `Stopped` ends every process with an exit code of its own, and with
    a line from the first process.
    """
    first = os.environ.get("RANK") in (None, "0")
    try:
        yield
    except Stopped as stopped:
        _end(f"distopt: stopped: {stopped}", STOPPED, quiet=not first)
    except (ValueError, OSError, collective.FileError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        who = "distopt" if first else f"distopt (rank {os.environ['RANK']})"
        line = f"{who}: error: {' '.join(str(error).split())}"
        _end(line, 1)


def _end(line: str, code: int, quiet: bool = False) -> NoReturn:
    # The launcher terminates the other ranks as soon as one exits, while they are exiting with the same code.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not quiet:
        # In one write: `print` writes the newline separately, and another rank's line may come in between.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    _tell_launcher(line)
    if collective.world() > 1:
        # Without shutdown: gloo aborts a process that closes its connections after another one has ended.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _tell_launcher(line: str) -> None:
    """Writes the file whose message torchrun, also under `accelerate launch`, repeats at the end of its report."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with open(file, "w") as out:
            json.dump({"message": line, "timestamp": int(time.time())}, out)
