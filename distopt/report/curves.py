"""The curves of runs: loss and gradient norm by step, tokens or seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distopt.job.drawing import Array, beyond, limits, smoothed
from distopt.report.colors import Style
from distopt.report.figure import SPACE, Figure, Trace, apart, escaped, layout, numbers, thinned
from distopt.report.grouping import DataSet, Group
from distopt.report.runs import Run

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
_POINTS = 30_000  # of the lines of a picture
_MARKS = 20  # of a run
_HOVER = "%{meta.run}: %{y:.5g}<br>%{xaxis.title.text} %{x}"


class _Curves:
    """The traces of a picture, with their x on each axis.

    Args:
        styles: The style of each group.
        low: The least value of the y axis.
        high: The greatest value of the y axis.
        positive: Whether the axis is logarithmic, and values <= 0 are left out.
    """

    def __init__(self, styles: Mapping[Group, Style], low: float, high: float, positive: bool) -> None:
        self.styles, self.low, self.high, self.positive = styles, low, high, positive
        self.scale: Callable[[float], float] = math.log10 if positive else float
        self.back: Callable[[float], float] = (lambda value: 10.0 ** min(value, 308.0)) if positive else float
        self.margin = 0.03 * (self.scale(high) - self.scale(low)) or 0.1  # beyond the least and the greatest value
        self.top = self.back(self.scale(high) + self.margin)
        self.told: list[int] = []  # the steps of marks with a number
        self.data: list[Trace] = []
        self.x: dict[str, list[list[float | None]]] = {by: [] for by in AXES}

    def add(
        self, group: Group, run: Run | None, rows: Sequence[Mapping[str, Any]], y: Sequence[Any] | Array, **trace: Any
    ) -> None:
        """Adds a trace, whose points are at the places of some rows; with a run, it is shown with that run's row."""
        style = self.styles[group]
        name = escaped(group.label) if style.named else "others"
        known = [value if value is None or not self.positive or value > 0 else None for value in numbers(y)]
        meta = {"run": escaped(run.name) if run else "", "name": run.name if run else None}
        for by in AXES:
            self.x[by].append(numbers(row[by] for row in rows))
        self.data.append(
            {
                "x": self.x["step"][-1],
                "y": known,
                "name": name,
                "legendgroup": name,
                "meta": meta,
                "hovertemplate": _HOVER,
                **trace,
            }
        )


class _Smooth(NamedTuple):
    """A line of a run: the indices of its points, which keep the peaks of the raw one, and both values there."""

    kept: NDArray[np.int64]
    raw: Array
    line: Array

    @classmethod
    def of(cls, dataset: DataSet, key: str) -> dict[Run, _Smooth]:
        """Smooths a quantity of all runs."""
        most = max(40, min(800, _POINTS // len(dataset.runs)))
        found = {}
        for run in dataset.runs:
            raw = np.array([row[key] for row in run.train], dtype=np.float64)
            kept = thinned(raw, most)
            found[run] = cls(kept, raw[kept], smoothed(raw, kept))
        return found


def loss(dataset: DataSet, styles: Mapping[Group, Style]) -> Figure:
    """Draw the losses of all runs: a smoothed line with the raw one behind it, and points for the validation."""
    smooth = _Smooth.of(dataset, "loss")
    validated = {run: [row["validation_loss"] for row in run.validation] for run in dataset.runs}
    steady = [run for run in dataset.runs if not run.diverged] or dataset.runs
    lines = [np.concatenate([smooth[run].line, validated[run]]) for run in steady]
    low, high = limits(lines, behind=[smooth[run].raw for run in steady])
    curves = _Curves(styles, low, high, positive=False)
    _lines(curves, dataset, smooth)
    for group in dataset.groups:
        for run in group.runs:
            style = styles[group]
            marker = {"color": style.color, "symbol": style.symbol, "size": 6 if style.named else 3}
            curves.add(group, run, run.validation, validated[run], mode="markers", marker=marker)
            _marks(curves, group, run)
    ends = {group: high if group.diverged else _end(smooth[group.runs[0]].line) for group in dataset.groups}
    return _figure("Loss: lines for training, smoothed, and points for validation", "nats per token", curves, ends)


def norms(dataset: DataSet, styles: Mapping[Group, Style]) -> Figure:
    """Draw the gradient norms of all runs, smoothed with the raw line behind."""
    smooth = _Smooth.of(dataset, "grad_norm")
    known = [float(value) for lines in smooth.values() for value in lines.raw if 0 < value < math.inf]
    low, high = min(known, default=0.0), max(known, default=1.0)
    curves = _Curves(styles, low, high, positive=bool(known))
    _lines(curves, dataset, smooth)
    ends = {group: _end(smooth[group.runs[0]].line) for group in dataset.groups}
    return _figure("Gradient norm before clipping", "2-norm", curves, ends)


def _lines(curves: _Curves, dataset: DataSet, smooth: Mapping[Run, _Smooth]) -> None:
    """Add the lines of all runs, the gray ones first: each smoothed, with the raw line behind it."""
    for group in sorted(dataset.groups, key=lambda group: curves.styles[group].named):
        style = curves.styles[group]
        for run in group.runs:
            kept, raw, smoothed_line = smooth[run]
            rows = [run.train[i] for i in kept]
            if style.named:
                behind = {"line": {"color": style.color, "width": 1}, "opacity": 0.3, "hoverinfo": "skip"}
                curves.add(group, run, rows, raw, mode="lines", **behind, hovertemplate=None)
            line = {"color": style.color, "dash": style.dash, "width": 2 if style.named else 1}
            curves.add(group, run, rows, smoothed_line, mode="lines", line=line)


def _marks(curves: _Curves, group: Group, run: Run) -> None:
    """Mark where losses are above the axis, with the greatest value if there is space, and where a run diverged."""
    rows = sorted([*run.train, *run.validation], key=lambda row: row["step"])
    values = [row["validation_loss"] if "validation_loss" in row else row["loss"] for row in rows]
    above = sorted(beyond(values, curves.top), key=lambda i: -values[i])[:_MARKS]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if above:
        at, apart_by = rows[above[0]]["step"], rows[-1]["step"] / 20
        told = not run.diverged and all(abs(at - step) > apart_by for step in curves.told)
        curves.told += [at] if told else []
        text = [f"{SPACE}{values[above[0]]:.3g}"] if told else []
        said = "above this axis: %{customdata:.5g}"
        _add_marks(curves, group, run, [rows[i] for i in above], [values[i] for i in above], "triangle-up", said, text)
    if run.diverged and finite:
        _add_marks(curves, group, run, [rows[finite[-1]]], [values[finite[-1]]], "x", "diverged", [])


def _add_marks(
    curves: _Curves,
    group: Group,
    run: Run,
    rows: list[dict[str, Any]],
    values: list[float],
    symbol: str,
    said: str,
    text: list[str],
) -> None:
    color = curves.styles[group].color
    trace = {
        "mode": "markers+text" if text else "markers",
        "marker": {"color": color, "symbol": symbol, "size": 9},
        "customdata": numbers(values),
        "hovertemplate": f"%{{meta.run}}<br>{said}",
        "text": text,
        "textposition": "middle right",
        "textfont": {"color": color, "size": 10},
    }
    curves.add(group, run, rows, [min(value, curves.high) for value in values], **trace)


def _end(curve: Array) -> float:
    """The last finite value of a curve; nan without one."""
    finite = curve[np.isfinite(curve)]
    return float(finite[-1]) if len(finite) else math.nan


def _figure(title: str, y: str, curves: _Curves, ends: Mapping[Group, float]) -> Figure:
    """Return the picture, with names at the ends of the lines that have one."""
    named = [group for group in ends if curves.styles[group].named]
    low, high, scale = curves.low, curves.high, curves.scale
    lasts = [group.runs[0].train[-1] for group in named]
    inside = [scale(min(max(ends[group], low), high)) if math.isfinite(ends[group]) else math.nan for group in named]
    places = [(last["step"], height) for last, height in zip(lasts, inside)]
    for group, last, height in zip(named, lasts, apart(places, scale(low), scale(high))):
        font = {"color": curves.styles[group].color, "size": 12}
        text = {"text": [f"{SPACE}{escaped(group.label)}"], "textposition": "middle right", "textfont": font}
        curves.add(group, None, [last], [curves.back(height)], mode="text", **text, cliponaxis=False, hoverinfo="skip")
    span = {
        "range": [scale(low) - curves.margin, scale(high) + curves.margin],
        "type": "log" if curves.positive else "linear",
    }
    axes = {}
    for by, words in AXES.items():
        most = max((x for trace in curves.x[by] for x in trace if x is not None), default=1.0)
        axes[by] = {"title": words, "range": [-0.01 * most, 1.01 * most], "x": curves.x[by]}
    labels = [group.label for group in named]
    drawn = layout(AXES["step"], y, {"range": axes["step"]["range"]}, span, labels)
    return Figure(title, curves.data, drawn, axes)
