"""What the log of a job says."""

from __future__ import annotations

import re
from pathlib import Path

# `ValueError: ...` at the end of a traceback, or a program's own `name: error: ...`.
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception)(?:: .*)?|[^:]+: error: .*)$")
# What ends because something else has ended.
_FOLLOWS = re.compile(r"ChildFailedError|CalledProcessError|SignalException|[Cc]onnection (?:reset|closed)|Broken pipe")


def lines(log: Path, start: int = 0, most: int = 1 << 18) -> list[str]:
    """The lines of a log from a position on, at most so many bytes; a progress bar writes over its line."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def error(log: Path, start: int = 0) -> str:
    """The line that says why a job failed: the last error that did not follow from another one; else the last line."""
    said = lines(log, start)
    errors = [match[1] for line in said if (match := _ERROR.match(line))]
    causes = [line for line in errors if not _FOLLOWS.search(line)]
    return (causes or errors or said or ["it wrote nothing"])[-1]
