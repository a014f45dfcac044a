"""The files of rows that a run writes, read and written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
LAYERS = "layers.jsonl"  # gradient norms and trust ratios of every parameter, at evaluations
ALARMS = "alarms.jsonl"  # of the run's health
SAMPLES = "samples.jsonl"  # what the model writes at evaluations
RUN = "run.json"  # the command of the run, and the choices of its groups


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Writes a row at the end of a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of a run's metrics.jsonl."""
    return read_lines(folder / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file up to the first incomplete line; none if there is no file.

    Raises:
        ValueError: For a line that is JSON and no row of a run, with the file and the number of the line.
    """
    rows = []
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{file}:{number} is no row of a run, an object with an integer step: {line:.60}")
        rows.append(row)
    return rows


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the rows that a resumed run writes again: later steps, and the validation at its checkpoint.

    Returns:
        The rows that are kept.
    """
    if not path.is_file():
        return []
    rows = read_lines(path) if step >= 0 else []
    kept = [row for row in rows if row["step"] < step or (row["step"] == step and "validation_loss" not in row)]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    aside.replace(path)
    return kept
