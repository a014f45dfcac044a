"""The search of `hydra/sweeper=optuna`: its trials, and the best of them so far."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distopt.bounds import shown
from distopt.job.drawing import COLORS, limits
from distopt.report.figure import Figure, Trace, escaped, layout, numbers

FILE = "trials.json"
# A pruned trial has the value at which it was stopped.
_MARKS = {"complete": ("circle", COLORS[0]), "pruned": ("x-open", COLORS[1])}


@dataclass(frozen=True)
class Trial:
    """A trial of a search, which is the run of the same number.

    Attributes:
        number: The number.
        state: complete, pruned, fail or running.
        values: What it has returned; none if it failed or runs.
        params: What was searched, in a line.
    """

    number: int
    state: str
    values: list[float]
    params: str


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        directions: minimize or maximize, for each value.
        trials: The trials, by number.
    """

    directions: list[str]
    trials: list[Trial]

    def of(self, *states: str) -> list[Trial]:
        """The trials of some states."""
        return [trial for trial in self.trials if trial.state in states]

    @property
    def best(self) -> Trial | None:
        """The best trial of a search with one value; None if there are several, or no trial has ended."""
        done = self.of("complete")
        if len(self.directions) > 1 or not done:
            return None
        return (min if self.directions[0] == "minimize" else max)(done, key=lambda trial: trial.values[0])

    @property
    def about(self) -> str:
        """What became of the trials, in a line."""
        names = {"complete": "ended", "pruned": "stopped early", "fail": "failed", "running": "running"}
        counts = {name: len(self.of(state)) for state, name in names.items()}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        best = self.best
        return said if best is None else f"{said}. The best is #{best.number}: {best.values[0]:.6g} with {best.params}"


def read_search(folder: Path) -> Search | None:
    """Return the search in a folder; None if there is none.

    Raises:
        ValueError: For a file that the sweeper has not written.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        directions, trials = [str(name) for name in found["directions"]], [_trial(row) for row in found["trials"]]
        if not directions or any(len(trial.values) != len(directions) for trial in trials if trial.state == "complete"):
            raise ValueError("a trial has no value")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no search ({shown(error)}); remove it") from error
    return Search(directions, trials)


def _trial(row: dict[str, Any]) -> Trial:
    params = ", ".join(f"{key}={_short(value)}" for key, value in row["params"].items())
    return Trial(int(row["number"]), str(row["state"]), [float(value) for value in row["values"] or ()], params)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(search: Search) -> Figure:
    """Draw the value of each trial by its number with the best so far, or the second value by the first."""
    trials = [trial for trial in search.of(*_MARKS) if len(trial.values) == len(search.directions)]
    if len(search.directions) > 1:
        data = _marks(trials, [t.values[0] for t in trials], [t.values[1] for t in trials])
        return Figure("The trials of the search", data, layout("first value", "second value", {}, {}))
    least = search.directions[0] == "minimize"
    low, high = limits([[t.values[0]] for t in trials]) if least else (-math.inf, math.inf)
    data = _marks(trials, [t.number for t in trials], [min(t.values[0], high) for t in trials], high)
    ended, found = search.of("complete"), list[float]()
    for trial in ended:
        found.append((min if least else max)([trial.values[0], *found[-1:]]))
    line = {"shape": "hv", "color": COLORS[0], "width": 1.5}
    about = {"name": "best so far", "mode": "lines", "line": line, "hoverinfo": "skip"}
    data.append({**about, "x": numbers(t.number for t in ended), "y": numbers(found)})
    margin = 0.05 * (high - low)
    axis = {"range": [low - margin, high + margin]} if least else {}
    return Figure("The trials of the search, and the best so far", data, layout("trial", "value", {}, axis))


def _marks(trials: Sequence[Trial], x: Sequence[float], y: Sequence[float], high: float = math.inf) -> list[Trace]:
    """The points of the trials, in a trace for each state; those above the axis are triangles at its end."""
    data: list[Trace] = []
    for state, (symbol, color) in _MARKS.items():
        at = [i for i, trial in enumerate(trials) if trial.state == state]
        text = [
            escaped(f"#{trials[i].number}: {', '.join(f'{v:.6g}' for v in trials[i].values)}; {trials[i].params}")
            for i in at
        ]
        symbols = ["triangle-up" if trials[i].values[0] > high else symbol for i in at]
        marker = {"color": color, "symbol": symbols, "size": 9}
        about = {"name": state, "mode": "markers", "hoverinfo": "text", "cliponaxis": False}
        points = {"x": numbers(x[i] for i in at), "y": numbers(y[i] for i in at)}
        data += [{**about, **points, "text": text, "marker": marker}] if at else []
    return data
