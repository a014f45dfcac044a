"""The files of a run, checked: a file that no run has written is refused by its name, and not by a traceback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distopt.bounds import mapping, shown

Rows = list[dict[str, Any]]
_OF_A_STEP = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second")
_ALSO = {"validation_loss", "bits_per_byte", "validation_token_accuracy", "target_tokens"}
_OF_AN_ALARM = ("kind", "layer", "value", "bound", "others")
_TEXTS = ("command", "model", "data", "tokenizer", "digest", "device", "version", "commit", "began", "stopped_early")
_COUNTS = ("parameters", "processes")


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


def checked_about(about: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the contents of a run.json: names by group, and texts and counts, of which those of older runs lack some.

    Raises:
        ValueError: For a value of another type.
    """
    choices = about.get("choices", {})
    mapping("names by group", of=(str, type(None))).check(f"{file}: choices", choices)
    for names, kind, what in ((_TEXTS, str, "a text"), (_COUNTS, int, "an integer")):
        for name in names:
            if name in about and (not isinstance(about[name], kind) or isinstance(about[name], bool)):
                raise ValueError(f"{file}: {name} must be {what}, got {shown(about[name])}")
    _check_starts(about.get("init"), file)
    return {**about, "choices": {group: choice for group, choice in choices.items() if choice is not None}}


def _check_starts(init: object, file: Path) -> None:
    """Raises `ValueError` unless a run started from scratch, or from a checkpoint of a run of which the same holds."""
    while init is not None:
        known = isinstance(init, Mapping) and isinstance(init.get("checkpoint"), str) and type(init.get("step")) is int
        if not known:
            raise ValueError(f"{file}: init must be null, or have a checkpoint and its step, got {shown(init)}")
        init = init.get("init")  # type: ignore[attr-defined]


def checked_rows(rows: Rows, file: Path) -> Rows:
    """Return the rows of metrics.jsonl; raise `ValueError` for the first that lacks a number, or has something else."""
    for row in rows:
        also = row.keys() & _ALSO
        for name in ("step", *(_OF_A_STEP if "loss" in row else ()), *also):
            if not _is_number(row.get(name)):
                raise ValueError(f"{file}: {name} of step {row['step']} must be a number, got {shown(row.get(name))}")
        if type(row.get("skipped", 0)) is not int:
            raise ValueError(f"{file}: skipped of step {row['step']} must be an integer, got {shown(row['skipped'])}")
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


def checked_samples(rows: Rows, file: Path) -> Rows:
    """Return the rows of samples.jsonl of its last step; raise `ValueError` for one without its texts."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    for row in last:
        for name in ("prompt", "sample", *(("answer",) if "match" in row else ())):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{file}: {name} of step {row['step']} must be a text, got {shown(row.get(name))}")
    return last


def checked_alarms(rows: Rows, file: Path) -> Rows:
    """Return the rows of alarms.jsonl; raise `ValueError` for one that lacks a value, or has text for a number."""
    for row in rows:
        for name in _OF_AN_ALARM:
            if name not in row or (name in ("value", "bound") and not _is_number(row[name])):
                what = "a number" if name in ("value", "bound") else "there"
                raise ValueError(f"{file}: {name} of step {row['step']} must be {what}, got {shown(row.get(name))}")
    return rows


def _is_number(value: object) -> bool:
    """Return whether a value is a number, which may be nan or inf, as those of a run that diverged are.

    An integer beyond the largest float is none: no axis has a place for it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
