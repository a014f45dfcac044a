"""Automatic restarts by the launcher (`--max_restarts`): which end of a job another attempt may follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from distopt.failures import attempt

_FILE = "TORCHELASTIC_ERROR_FILE"  # <folder of the launch>/attempt_<n>/<local rank>/error.json


class End(NamedTuple):
    """The end of a job: the line that says why, and the exit code."""

    line: str
    code: int


def earlier_end() -> End | None:
    """Returns the end of the attempt before this one, on this machine, if no other attempt may follow it.

    A job that has been refused or stopped ends the same way however often it is started; torch's launcher restarts
    every process whose exit code is not 0.
    """
    file, restarts = os.environ.get(_FILE), attempt()
    if not file or not restarts:
        return None
    before = Path(file).parents[1].with_name(f"attempt_{restarts - 1}")
    for error in sorted(before.glob("*/error.json")):
        try:
            content: Any = json.loads(error.read_text())
            return End(content["message"], int(content["final"]))
        except (OSError, ValueError, KeyError, TypeError):  # of a process that died in another way
            continue
    return None


def tell_launcher(line: str, timestamp: int, final: int | None) -> None:
    """Writes the file whose message torchrun, also under `accelerate launch`, repeats at the end of its report.

    Args:
        line: The message.
        timestamp: The time in seconds since the epoch.
        final: The exit code, if no other attempt may follow.
    """
    if file := os.environ.get(_FILE):
        content = {"message": line, "timestamp": timestamp}
        with open(file, "w") as out:
            json.dump(content if final is None else content | {"final": final}, out)
