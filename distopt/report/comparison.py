"""The comparison of `hydra/sweeper=coordinate`: its rows, tuned and run with several seeds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distopt.bounds import shown
from distopt.job.drawing import COLORS, limits
from distopt.report.figure import Figure, Trace, escaped, layout, numbers
from distopt.report.grouping import deviation, mean

FILE = "comparison.json"


@dataclass(frozen=True)
class Row:
    """A row of a comparison.

    Attributes:
        name: The row.
        settings: The values that the search has chosen, in a line.
        losses: The losses of the runs that are compared, one of each seed; inf where a run diverged.
    """

    name: str
    settings: str
    losses: list[float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return mean(self.losses)

    @property
    def deviation(self) -> float:
        """The sample standard deviation over the seeds."""
        return deviation(self.losses)


def read_comparison(folder: Path) -> list[Row]:
    """Return the rows of the comparison in a folder, the best first; none if there is no comparison.

    Raises:
        ValueError: For a file that the sweeper has not written.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        return [_row(row) for row in json.loads(file.read_text())]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no comparison ({shown(error)}); remove it") from error


def _row(row: dict[str, Any]) -> Row:
    settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
    return Row(str(row["name"]), settings, [float(loss) for loss in row["losses"]])


def draw(rows: list[Row]) -> Figure:
    """Draw the losses of all seeds of each row, with their mean and deviation."""
    low, high = limits([[loss for row in rows for loss in row.losses]])
    data: list[Trace] = []
    for i, row in enumerate(rows):
        name, color = escaped(row.name), COLORS[i % len(COLORS)]
        about = {"name": name, "cliponaxis": False, "mode": "markers"}
        inside = [loss for loss in row.losses if loss <= high]
        marker = {"color": color, "size": 7, "opacity": 0.6}
        data.append({**about, "x": numbers(inside), "y": [name] * len(inside), "marker": marker})
        if above := [loss for loss in row.losses if loss > high]:
            said = [f"{loss:.5g}" if math.isfinite(loss) else "diverged" for loss in above]
            mark = {"marker": {"color": color, "symbol": "triangle-right", "size": 10}, "text": said}
            data.append({**about, "x": [high] * len(above), "y": [name] * len(above), **mark, "hoverinfo": "text"})
        if math.isfinite(row.mean) and row.mean <= high:
            error = {"type": "data", "array": numbers([row.deviation]), "color": color}
            mark = {"marker": {"color": color, "symbol": "line-ns", "size": 14, "line": {"color": color, "width": 2}}}
            data.append({**about, "x": numbers([row.mean]), "y": [name], **mark, "error_x": error})
    margin = 0.05 * (high - low)
    span, names = {"range": [low - margin, high + margin]}, {"autorange": "reversed", "automargin": True}
    drawn = {**layout("final validation loss, nats per token", "", span, names), "height": 110 + 24 * len(rows)}
    return Figure("Each tuned: all seeds, mean and standard deviation", data, drawn)
