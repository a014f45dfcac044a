"""A picture of the page: its traces in plotly's format, and what is common to all of them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.job.drawing import Array

Trace = dict[str, Any]
HEIGHT = 460  # pixels
_PLOT = 340  # of which the axes have about as many
_LINE = 15  # of a name
SPACE = "\u2002"  # between a line and its name


@dataclass
class Figure:
    """A picture.

    Attributes:
        title: What it shows, in a line.
        data: The traces.
        layout: The layout, to which the page adds the colors of its theme.
        axes: The x axes between which the page switches: the title, the range, and x of every trace.
    """

    title: str
    data: list[Trace]
    layout: dict[str, Any]
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)


def layout(
    x: str, y: str, xaxis: Mapping[str, Any], yaxis: Mapping[str, Any], names: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the layout of a picture with names beside its lines.

    Args:
        x: The title of the x axis.
        y: The title of the y axis.
        xaxis: Further options of the x axis.
        yaxis: Further options of the y axis.
        names: The names, which need space on the right.
    """
    widest = max(map(len, names), default=0)
    return {
        "height": HEIGHT,
        "margin": {"l": 62, "r": 30 + min(6.6 * widest, 250), "t": 30, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "showlegend": False,  # the page has its own
        "xaxis": {"title": {"text": x}, "zeroline": False, **xaxis},
        "yaxis": {"title": {"text": y}, "zeroline": False, **yaxis},
    }


def escaped(text: str) -> str:
    """Return a text for plotly, which reads some of HTML."""
    return html.escape(text, quote=False)


def numbers(values: Iterable[float]) -> list[float | None]:
    """Return numbers for JSON, to six digits: null for those that are not finite, a gap in a line."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in map(float, values)]


def thinned(values: Sequence[float] | Array, most: int) -> NDArray[np.int64]:
    """Return the indices of at most so many points that keep every peak: the extremes of consecutive parts.

    Args:
        values: The values of a line.
        most: The most points, at least 4.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= most:
        return np.arange(len(array), dtype=np.int64)
    least, greatest = (np.where(np.isfinite(array), array, filled) for filled in (math.inf, -math.inf))
    kept = {0, len(array) - 1}
    for part in np.array_split(np.arange(len(array)), (most - 2) // 2):
        kept |= {int(part[least[part].argmin()]), int(part[greatest[part].argmax()])}
    return np.array(sorted(kept), dtype=np.int64)


def apart(ends: Sequence[tuple[float, float]], low: float, high: float) -> list[float]:
    """Return the heights of names that do not overlap, as near as possible to the ends of their lines.

    Args:
        ends: Where the lines end, (x, y); nan for a line without an end.
        low: The least value of the axis.
        high: The greatest value of the axis.
    """
    gap = (high - low) * _LINE / _PLOT
    found = [math.nan] * len(ends)
    for place in {x for x, _ in ends}:
        order = sorted((y, i) for i, (x, y) in enumerate(ends) if x == place and math.isfinite(y))
        below, above = -math.inf, high + gap
        for y, i in order:
            below = found[i] = max(min(max(y, low), high), below + gap)
        for _, i in reversed(order):
            above = found[i] = min(found[i], above - gap)
    return found
