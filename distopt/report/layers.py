"""What was measured of every parameter: colors by parameter and step, of the best run of each optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distopt.report.figure import Figure, Trace, escaped, numbers
from distopt.report.grouping import Group
from distopt.report.runs import Run

QUANTITIES = {
    "grad_norm": "Gradient norm of each parameter",
    "trust_ratio": "Trust ratio of each parameter",
    "weight_norm": "Norm of each parameter",
    "update_norm": "Norm of the update of each parameter",
    "update_to_weight": "Norm of the update of each parameter, as a share of its weights'",
}
_CELLS = 6000  # of a picture
_MOST = 8  # optimizers


def layers(groups: Sequence[Group]) -> list[Figure]:
    """Draw each quantity that some runs recorded; the page shows the best run, and lets one choose the others."""
    drawn = []
    for key, title in QUANTITIES.items():
        if runs := best(groups, key)[:_MOST]:
            data = [{**_heatmap(run, key), "visible": not i} for i, run in enumerate(runs)]
            rows = max(len(trace["y"]) for trace in data)
            drawn.append(
                Figure(
                    title,
                    data,
                    {
                        "height": min(max(260, 90 + 14 * rows), 900),
                        "margin": {"l": 20, "r": 20, "t": 30, "b": 48},
                        "xaxis": {"title": {"text": "step"}, "type": "category", "nticks": 12},
                        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
                    },
                )
            )
    return drawn


def best(groups: Sequence[Group], key: str) -> list[Run]:
    """Return the best run of each optimizer that recorded this quantity per parameter; the best optimizer first."""
    runs = [run for group in groups for run in group.runs if any(row.get(key) for row in run.layers)]
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (math.isnan(run.final), run.final)):
        found.setdefault(run.optimizer, run)
    return list(found.values())


def _heatmap(run: Run, key: str) -> Trace:
    rows = [row for row in run.layers if row.get(key)]
    names = list(rows[0][key])
    every = max(1, math.ceil(len(rows) * len(names) / _CELLS))
    rows = rows[::every]
    values = [[_log(row[key].get(name)) for row in rows] for name in names]
    return {
        "type": "heatmap",
        "name": escaped(f"{run.optimizer}, {run.name}"),
        "x": [str(row["step"]) for row in rows],
        "y": [escaped(name) for name in names],
        "z": [numbers(line) for line in values],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "log10"}, "thickness": 14},
        "hovertemplate": "%{y}<br>step %{x}: 10^%{z:.2f}<extra></extra>",
    }


def _log(value: float | None) -> float:
    return math.log10(value) if value is not None and 0 < value < math.inf else math.nan
