"""The tables of the page: the results of groups, and all runs with what differs between them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from distopt.report.grouping import DataSet, Group, deviation, differing, mean, short, value_of
from distopt.report.runs import Run


class Cell(NamedTuple):
    """A cell: its text, the number by which its column is sorted if it is one, and a link."""

    text: str
    sort: float | None = None
    link: str | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: The titles of the columns.
        numeric: Whether each column consists of numbers.
        rows: The rows.
        names: The names of the runs of each row, by which pictures are filtered with it.
        common: What has one value for all rows, by title.
    """

    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    names: list[list[str]]
    common: dict[str, str]


def results(dataset: DataSet) -> Table:
    """Return the groups, the best first, with mean and deviation over their seeds."""
    columns: dict[str, Callable[[Group], Cell]] = {
        "configuration": lambda group: Cell(group.label),
        "n": lambda group: number(len(group.runs)),
        "bits per byte": lambda group: _spread([run.bits_per_byte for run in group.runs]),
        "nats per token": lambda group: _spread([run.final for run in group.runs]),
        "accuracy": lambda group: number(mean(run.accuracy for run in group.runs), ".1%"),
        "exact match": lambda group: number(mean(run.exact_match for run in group.runs), ".1%"),
        "steps": lambda group: number(mean(run.steps for run in group.runs), ",.0f"),
        "tokens/s": lambda group: number(mean(run.tokens_per_second for run in group.runs), ",.0f"),
        "skipped": lambda group: number(mean(run.skipped for run in group.runs)),
        "": lambda group: Cell(_state(group.runs)),
    }
    return _table(dataset.groups, columns, [group.runs for group in dataset.groups], keep=tuple(columns))


def all_runs(runs: Sequence[Run], page: Path) -> Table:
    """Return all runs: what they are, what they measured, and the keys by which they differ.

    Args:
        runs: The runs.
        page: The folder of the page, from which the links lead to the folders of the runs.
    """
    keys = [key for key in differing(runs) if key not in ("optimizer", "optimizer._target_", "optimizer.lr")]
    columns: dict[str, Callable[[Run], Cell]] = {
        "run": lambda run: Cell(run.name, link=_link(run.folder, page)),
        "optimizer": lambda run: Cell(run.optimizer),
        "lr": lambda run: number(run.lr),
        "seed": lambda run: _value(run.config.get("seed")),
        "bits per byte": lambda run: number(run.bits_per_byte, ".4f"),
        "nats per token": lambda run: number(run.final, ".4f"),
        "accuracy": lambda run: number(run.accuracy, ".1%"),
        "exact match": lambda run: number(run.exact_match, ".1%"),
        "steps": lambda run: number(run.steps, ",d"),
        "tokens": lambda run: number(run.tokens, ",.0f"),
        "targets": lambda run: number(run.target_tokens, ",.0f"),
        "state": lambda run: Cell(_state([run]) or "finished"),
        "started from": lambda run: Cell(_starts(run.about.get("init"))),
        "model": lambda run: Cell(run.about.get("model") or run.choices.get("model", "")),
        "parameters": lambda run: number(run.about.get("parameters", math.nan), ",d"),
        "data": lambda run: Cell(run.about.get("data") or str(run.config.get("data.path") or "")),
        "tokenizer": lambda run: Cell(run.about.get("tokenizer", "")),
        "device": lambda run: Cell(run.about.get("device", "")),
        "processes": lambda run: number(run.about.get("processes", math.nan), "d"),
        "version": lambda run: Cell(run.about.get("version", "")),
        "commit": lambda run: Cell(run.about.get("commit", "")),
        "began": lambda run: _began(run.about.get("began", "")),
        "time": lambda run: _time(run.train[-1]["seconds"]),
        "tokens/s": lambda run: number(run.tokens_per_second, ",.0f"),
        "skipped": lambda run: number(run.skipped, "d"),
    }
    for key in keys:
        columns[short(key, [*keys, *columns])] = lambda run, key=key: _value(value_of(run, key))  # type: ignore[misc]
    keep = ("run", "optimizer", "lr", "bits per byte", "nats per token", "steps", "time", "tokens/s")
    return _table(runs, columns, [[run] for run in runs], keep)


def _table(
    things: Sequence[Any], columns: dict[str, Callable[[Any], Cell]], runs: Sequence[Sequence[Run]], keep: Sequence[str]
) -> Table:
    """A table whose columns with one value only are said once, but for some that are kept."""
    cells = {title: [of(thing) for thing in things] for title, of in columns.items()}
    common = {title: column[0].text for title, column in cells.items() if len({cell.text for cell in column}) == 1}
    shown = [title for title in cells if title in keep or title not in common]
    shown = [title for title in shown if any(cell.text for cell in cells[title])]
    return Table(
        columns=shown,
        numeric=[any(cell.sort is not None for cell in cells[title]) for title in shown],
        rows=[list(row) for row in zip(*(cells[title] for title in shown))],
        names=[[run.name for run in of_row] for of_row in runs],
        common={title: text for title, text in common.items() if title not in shown and text},
    )


def number(value: float, form: str = "g") -> Cell:
    """Return the cell of a number; an empty one for nan, which is sorted last."""
    if math.isnan(value):
        return Cell("", math.inf)
    if not math.isfinite(value):
        return Cell(f"{value:g}", 1e308)
    return Cell(format(value, form) if abs(value) < 1e15 else f"{value:g}", float(value))


def _spread(values: Sequence[float]) -> Cell:
    """Mean and deviation; for runs of which some diverged, the mean of the others in brackets."""
    whole, spread = mean(values), deviation(values)
    if math.isfinite(whole):
        return number(whole, ".4f")._replace(text=f"{whole:.4f}" + (f" ± {spread:.4f}" if spread == spread else ""))
    others = mean(value for value in values if math.isfinite(value))
    return number(whole)._replace(text=f"inf ({others:.4f} without)") if math.isfinite(others) else number(whole)


def _state(runs: Sequence[Run]) -> str:
    """What is unusual about some runs, in words."""
    counts = {
        "diverged": sum(run.diverged for run in runs),
        "unfinished": sum(run.unfinished for run in runs),
        "stopped early": sum(bool(run.stopped_early) for run in runs),
    }
    of = f" of {len(runs)} " if len(runs) > 1 else " "
    return ", ".join(f"{count}{of}{what}" if len(runs) > 1 else what for what, count in counts.items() if count)


def _starts(init: dict[str, Any] | None) -> str:
    """The runs that a run came from, the last one first: sharp, step 400 < pretrain, step 1,000."""
    starts = []
    while init:
        path = Path(init["checkpoint"])
        run = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
        starts.append(f"{run}, step {init['step']:,}")
        init = init.get("init")
    return " < ".join(starts)


def _value(value: Any) -> Cell:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return number(value)
    return Cell("" if value is None else str(value))


def _began(text: str) -> Cell:
    """A time in this page's time zone, to the minute."""
    try:
        began = datetime.fromisoformat(text).astimezone()
        return Cell(f"{began:%Y-%m-%d %H:%M}", began.timestamp())
    except (ValueError, OverflowError, OSError):
        return Cell(text)


def _time(seconds: float) -> Cell:
    """The time of all steps: 2 h 05 min, 12 min 10 s, or 4.2 s."""
    if not 0 <= seconds < 1e9:
        return Cell("", math.inf)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    text = (
        f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
    )
    return Cell(text, seconds)


def _link(folder: Path, page: Path) -> str:
    return quote(os.fsencode(os.path.relpath(folder.resolve(), page.resolve())) + b"/")
