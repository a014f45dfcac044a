"""The log of a job: its last lines, and the line of the error."""

from __future__ import annotations

import re
from pathlib import Path

# `ValueError: ...` at the end of a traceback, or a program's own `name: error: ...`.
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception)(?:: .*)?|[^:]+: error: .*)$")
# Errors that follow from the failure of another process.
_FOLLOWS = re.compile(r"ChildFailedError|CalledProcessError|SignalException|[Cc]onnection (?:reset|closed)|Broken pipe")


def lines(log: Path, start: int = 0, most: int = 1 << 18) -> list[str]:
    """Return lines of a log; each state of a progress bar is a line.

    Args:
        log: The file.
        start: The position, in bytes, to read from.
        most: The largest number of bytes to read, from the end.
    """
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def error(log: Path, start: int = 0) -> str:
    """Return the reason of a failure: the last error that follows from no other, or else the last line."""
    said = lines(log, start)
    errors = [match[1] for line in said if (match := _ERROR.match(line))]
    causes = [line for line in errors if not _FOLLOWS.search(line)]
    return (causes or errors or said or ["it wrote nothing"])[-1]
