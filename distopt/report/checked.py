"""The files of a run, checked: a file that no run has written is refused by its name, and not by a traceback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distopt.bounds import mapping, shown

Rows = list[dict[str, Any]]
_OF_A_STEP = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second")


def read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Read a file of values by name; empty if there is no file.

    Args:
        file: The file.
        parse: The function that parses its text, such as `json.loads`.

    Raises:
        ValueError: If it cannot be parsed, or contains something else.
    """
    if not file.is_file():
        return {}
    try:
        values = parse(file.read_text()) or {}
    except Exception as error:  # each parser has its own classes of errors
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}); remove it, or the run") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be values by name, got {shown(values)}; remove it, or the run")
    return values


def checked_choices(choices: Any, file: Path) -> dict[str, str]:
    """Return the choices of a run's groups; raise `ValueError` unless they are names by group."""
    mapping("names by group", of=(str, type(None))).check(f"{file}: choices", choices)
    return {group: choice for group, choice in choices.items() if choice is not None}


def checked_rows(rows: Rows, file: Path) -> Rows:
    """Return the rows of metrics.jsonl; raise `ValueError` for the first that lacks a number, or has something else."""
    for row in rows:
        for name in _OF_A_STEP if "loss" in row else row.keys() & {"validation_loss", "bits_per_byte"}:
            if not _is_number(row.get(name)):
                raise ValueError(f"{file}: {name} of step {row['step']} must be a number, got {shown(row.get(name))}")
    return rows


def checked_layers(rows: Rows, file: Path) -> Rows:
    """Return the rows of layers.jsonl; raise `ValueError` unless they have numbers by the names of parameters."""
    for row in rows:
        for name in row.keys() - {"step"}:
            values = row[name]
            if not isinstance(values, Mapping) or not all(v is None or _is_number(v) for v in values.values()):
                raise ValueError(
                    f"{file}: {name} of step {row['step']} must be numbers by the name of a parameter, "
                    f"got {shown(values)}"
                )
    return rows


def _is_number(value: object) -> bool:
    """Return whether a value is a number, which may be nan or inf, as those of a run that diverged are."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
