"""What is wrong with the user's input, in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator

from distopt import ranks


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError, or a file that cannot be read or written, into one line on stderr and exit code 1.

    HYDRA_FULL_ERROR=1 gives the traceback. Ctrl-C is one line too, of the first process, and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # some more may come: from the terminal, and from the launcher
        if os.environ.get("RANK") in (None, "0"):
            sys.stderr.write("\ndistopt: interrupted; train.resume=auto goes on from the last checkpoint\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(130)
    except (ValueError, OSError, ranks.FileError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        rank = os.environ.get("RANK")
        who = "distopt" if rank in (None, "0") else f"distopt (rank {rank})"
        line = f"{who}: error: {' '.join(str(error).split())}"
        # The launcher ends the other ranks as soon as it sees one exit; they are on their way out with the same code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # In one piece: `print` writes the end of the line by itself, and another rank's line may come in between.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
        _tell_launcher(line)
        if ranks.world() > 1:
            # At once: gloo aborts a process that takes its connections down while another one has ended.
            sys.stdout.flush()
            os._exit(1)
        sys.exit(1)


def _tell_launcher(line: str) -> None:
    """torchrun, under `accelerate launch` too, repeats what stands in this file at the end of its own report."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with open(file, "w") as out:
            json.dump({"message": line, "timestamp": int(time.time())}, out)
