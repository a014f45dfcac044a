"""What is wrong with the user's input, in one line."""

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

    HYDRA_FULL_ERROR=1 gives the traceback. Stopped ends every process with its own code, and a line of the first one.
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
    # The launcher ends the other ranks as soon as it sees one exit; they are on their way out with the same code.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not quiet:
        # In one piece: `print` writes the end of the line by itself, and another rank's line may come in between.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    _tell_launcher(line)
    if collective.world() > 1:
        # At once: gloo aborts a process that takes its connections down while another one has ended.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _tell_launcher(line: str) -> None:
    """torchrun, under `accelerate launch` too, repeats what stands in this file at the end of its own report."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with open(file, "w") as out:
            json.dump({"message": line, "timestamp": int(time.time())}, out)
