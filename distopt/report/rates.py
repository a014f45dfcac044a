"""The final loss by the learning rate, a line for each optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distopt.job.drawing import limits
from distopt.report.colors import Style
from distopt.report.figure import SPACE, Figure, Trace, apart, escaped, layout, numbers
from distopt.report.grouping import DataSet, Group, deviation, mean


def by_lr(dataset: DataSet, styles: Mapping[Group, Style], colors: Mapping[str, str]) -> Figure | None:
    """Draw the mean final loss of each group, with its deviation, by the largest learning rate.

    A line joins the best group of each rate. A group that diverged, or is above the axis, has a triangle at its end.

    Args:
        dataset: The groups.
        styles: The style of each group.
        colors: The color of each optimizer.

    Returns:
        The picture; None if all rates are equal.
    """
    if len({group.runs[0].lr for group in dataset.groups}) < 2:
        return None
    optimizers = list(dict.fromkeys(group.optimizer for group in dataset.groups))
    of = {name: [group for group in dataset.groups if group.optimizer == name] for name in optimizers}
    spread = [0.0 if math.isnan(sd := deviation(run.final for run in group.runs)) else sd for group in dataset.groups]
    finals = [group.final for group in dataset.groups]
    low, high = limits([[f - sd for f, sd in zip(finals, spread)] + [f + sd for f, sd in zip(finals, spread)]])
    data: list[Trace] = []
    ends: dict[str, tuple[float, float]] = {}
    for name, groups in of.items():
        best: dict[float, float] = {}
        for group in groups:
            if not math.isnan(group.final):
                best[group.runs[0].lr] = min(group.final, best.get(group.runs[0].lr, math.inf))
        rates = [lr for lr in sorted(best) if math.isfinite(best[lr])]
        ends[name] = (rates[-1], best[rates[-1]]) if rates else (math.nan, math.nan)
        data += _of_optimizer(name, groups, styles, colors[name], high)
        line = {"color": colors[name], "width": 2}
        data.append(_trace(name, rates, [best[lr] for lr in rates], mode="lines", line=line, hoverinfo="skip"))
    for (name, (lr, _)), height in zip(ends.items(), apart([*ends.values()], low, high)):
        text = {
            "text": [f"{SPACE}{escaped(name)}"],
            "textposition": "middle right",
            "textfont": {"color": colors[name]},
        }
        data.append(_trace(name, [lr], [height], mode="text", **text, cliponaxis=False, hoverinfo="skip"))
    margin = 0.06 * (high - low)
    rates_axis = {"type": "log", **_ticks([group.runs[0].lr for group in dataset.groups])}
    span = {"range": [low - margin, high + margin]}
    drawn = layout("largest learning rate", "nats per token", rates_axis, span, optimizers)
    return Figure("Final validation loss by learning rate: mean and deviation over seeds", data, drawn)


def _ticks(rates: list[float]) -> dict[str, list[Any]]:
    """The rates themselves, but for those too near to another one for its text."""
    positive = sorted({lr for lr in rates if 0 < lr < math.inf})
    shown: list[float] = []
    for lr in positive:
        if not shown or math.log(lr / shown[-1]) >= 0.11 * math.log(positive[-1] / positive[0]):
            shown.append(lr)
    return {"tickvals": numbers(shown), "ticktext": [f"{lr:.3g}" for lr in shown]}


def _of_optimizer(
    name: str, groups: list[Group], styles: Mapping[Group, Style], color: str, high: float
) -> list[Trace]:
    """The points of an optimizer's groups, and the triangles of those above the axis."""
    measured = [group for group in groups if not math.isnan(group.final)]
    inside = [group for group in measured if group.final <= high]
    above = [group for group in measured if group.final > high]
    spread = numbers(deviation(run.final for run in group.runs) for group in inside)
    points = _trace(
        name,
        [group.runs[0].lr for group in inside],
        [group.final for group in inside],
        mode="markers",
        error_y={"type": "data", "array": spread, "color": color, "thickness": 1.5},
        marker={"color": color, "symbol": [styles[group].symbol for group in inside], "size": 8},
        customdata=[[escaped(group.label), len(group.runs)] for group in inside],
        hovertemplate="%{customdata[0]}<br>%{y:.5g}, n = %{customdata[1]}",
    )
    triangles = _trace(
        name,
        [group.runs[0].lr for group in above],
        [high for _ in above],
        mode="markers",
        marker={"color": color, "symbol": "triangle-up", "size": 10},
        cliponaxis=False,
        customdata=[[escaped(group.label), _said(group)] for group in above],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}",
    )
    return [points, triangles] if above else [points]


def _said(group: Group) -> str:
    if math.isfinite(group.final):
        return f"above this axis: {group.final:.5g}"
    others = mean(run.final for run in group.runs if math.isfinite(run.final))
    rest = "" if math.isnan(others) else f"; the mean of the others is {others:.5g}"
    return f"{group.diverged} of {len(group.runs)} diverged{rest}"


def _trace(name: str, x: list[float], y: list[float], **trace: object) -> Trace:
    shown = escaped(name)
    return {"x": numbers(x), "y": numbers(y), "name": shown, "legendgroup": shown, **trace}
