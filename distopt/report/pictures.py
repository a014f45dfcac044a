"""The pictures of a report, as PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distopt.report.runs import Group, Run, median

_MANY = 12  # the most groups in a legend; if there are more, only the best of each optimizer are drawn in color
_AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}


def draw(folder: Path, groups: Sequence[Group]) -> dict[str, Path]:
    """Draw the pictures for which these runs have data.

    Args:
        folder: The folder to write the PNG files to.
        groups: The groups of runs, the best first.

    Returns:
        The files, by title.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn: dict[str, Path] = {}
    for axis, label in _AXES.items():
        drawn[f"Loss by {label}"] = _save(folder / f"loss_by_{axis}.png", partial(curves, groups=groups, by=axis))
    if len({run.lr for group in groups for run in group.runs}) > 1:
        drawn["Learning rate and final loss"] = _save(folder / "lr.png", partial(by_lr, groups=groups))
    drawn["Gradient norm"] = _save(folder / "grad_norm.png", partial(norms, groups=groups))
    for key, title in (
        ("grad_norm", "Gradient norm of each parameter"),
        ("trust_ratio", "Trust ratio of each parameter"),
        ("weight_norm", "Norm of each parameter"),
        ("update_norm", "Norm of the update of each parameter"),
        ("update_to_weight", "Norm of the update of each parameter, as a share of its weights'"),
    ):
        for run in best(groups, key):
            file = folder / f"layers_{key}_{re.sub('[^a-z0-9]+', '_', run.optimizer.lower())}.png"
            drawn[f"{title}: {run.optimizer}, {run.name}"] = _save(file, partial(layers, run=run, key=key))
    return drawn


def best(groups: Sequence[Group], key: str) -> list[Run]:
    """Return the best run of each optimizer that recorded this quantity per parameter; the best optimizer first."""
    runs = [run for group in groups for run in group.runs if any(row.get(key) for row in run.layers)]
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (math.isnan(run.final), run.final)):
        found.setdefault(run.optimizer, run)
    return list(found.values())


def _save(file: Path, fill: Callable[[Any], None]) -> Path:
    from matplotlib import pyplot as plt

    with plt.rc_context({"text.parse_math": False}):  # a $ in a name or a path begins no formula
        figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
        fill(axis)
        axis.grid(alpha=0.3)
        figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def curves(axis: Any, groups: Sequence[Group], by: str) -> None:
    """Draw the loss of every run by step, tokens or seconds: a smoothed line for training, dots for validation."""
    for group, style, label in _styled(groups):
        for i, run in enumerate(group.runs):
            trained = [row[by] for row in run.train], _smooth([row["loss"] for row in run.train])
            axis.plot(*trained, **style, alpha=0.3, lw=0.8)
            points = [row[by] for row in run.validation], [row["validation_loss"] for row in run.validation]
            axis.plot(*points, "o-", **style, ms=3, label=None if i else label)
    axis.set_xlabel(_AXES[by])
    axis.set_ylabel("loss, nats per token (line: train, dots: validation)")
    _bound(axis, [row["loss"] for group in groups for run in group.runs for row in run.train])
    axis.legend(fontsize=7)


def by_lr(axis: Any, groups: Sequence[Group]) -> None:
    """Draw the median final loss by the largest learning rate, a line for each optimizer; inf has no dot."""
    points: dict[str, dict[float, list[float]]] = {}
    for group in groups:
        for run in group.runs:
            points.setdefault(run.optimizer, {}).setdefault(run.lr, []).append(run.final)
    finals = []
    for index, (optimizer, found) in enumerate(points.items()):
        rates = sorted(found)
        medians = [median(found[lr]) for lr in rates]
        finals += medians
        axis.plot(rates, medians, "o-", color=_color(index), label=optimizer)
    axis.set_xscale("log")
    axis.set_xlabel("largest learning rate")
    axis.set_ylabel("final validation loss, nats per token")
    _bound(axis, finals)
    axis.legend(fontsize=7)


def norms(axis: Any, groups: Sequence[Group]) -> None:
    """Draw the gradient norm of every run by step."""
    for group, style, label in _styled(groups):
        for i, run in enumerate(group.runs):
            steps, norms = [row["step"] for row in run.train], [row["grad_norm"] for row in run.train]
            axis.plot(steps, norms, **style, lw=0.8, alpha=0.8, label=None if i else label)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("gradient norm before clipping")
    axis.legend(fontsize=7)


def layers(axis: Any, run: Run, key: str) -> None:
    """Draw a quantity of every parameter of a run, as colors by step."""
    from matplotlib.colors import LogNorm

    rows = [row for row in run.layers if row.get(key)]
    names = list(rows[0][key])
    values = [[row[key].get(name) or math.nan for row in rows] for name in names]
    positive = [v for line in values for v in line if v == v and 0 < v < math.inf]
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    image = axis.imshow(values, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis")
    axis.figure.colorbar(image, ax=axis, label=key.replace("_", " "))
    every = max(1, len(names) // 40)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=6)
    some = range(0, len(rows), max(1, len(rows) // 10))
    axis.set_xticks(some, [rows[i]["step"] for i in some])
    axis.set_xlabel("step")
    axis.figure.set_size_inches(9, max(5.5, 0.13 * min(len(names), 40) + 2))


def _bound(axis: Any, values: Sequence[float]) -> None:
    """Limit the axis, so that a run that diverged does not flatten the others."""
    finite = sorted(v for v in values if math.isfinite(v))
    if finite:
        low, high = finite[0], finite[int(0.98 * (len(finite) - 1))]
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)


def _styled(groups: Sequence[Group]) -> list[tuple[Group, dict[str, Any], str | None]]:
    """Return the groups with the style and the label of their lines.

    If there are too many for a legend, all but the best of each optimizer are gray, have no label and are drawn below.
    """
    firsts = {group.runs[0].optimizer: group for group in reversed(groups)}.values()  # the best one comes first
    chosen = [group for group in groups if len(groups) <= _MANY or group in firsts][:_MANY]
    gray = [(group, {"color": "lightgray", "zorder": 1.0}, None) for group in groups if group not in chosen]
    return gray + [(group, {"color": _color(i), "zorder": 2.0}, group.label) for i, group in enumerate(chosen)]


def _color(index: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](index % 20)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    smooth, average, total = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smooth.append(average / total if total else math.nan)
    return smooth
