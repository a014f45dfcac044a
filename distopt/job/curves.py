"""The picture of a run: loss, learning rate and gradient norm over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distopt.job.drawing import COLORS, beyond, limits, smoothed
from distopt.job.records import read_metrics

_POINTS = 1000  # of the smoothed line
_TRAIN, _VALIDATION, _LR, _NORM = COLORS[:4]


def draw_curves(folder: Path) -> Path:
    """Draws loss, learning rate and gradient norm over the steps into `curves.png`; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = read_metrics(folder)
    train = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    figure = Figure(figsize=(8, 9))
    FigureCanvasAgg(figure)  # without pyplot, whose import takes longer than the picture
    loss, lr, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.06, top=0.94, hspace=0.08)
    _loss(loss, train, validation)
    lr.plot(*_columns(train, "lr"), color=_LR)
    lr.set_ylabel("learning rate")
    lr.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    norm.plot(*_columns(train, "grad_norm"), color=_NORM, linewidth=0.8)
    if any(row["grad_norm"] > 0 for row in train):
        norm.set_yscale("log")
        norm.yaxis.set_major_formatter(LogFormatter())  # plain text: parsing formulas takes half of the drawing
        norm.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("step")
    for axis in (loss, lr, norm):
        axis.grid(alpha=0.3)
    figure.suptitle(folder.name, parse_math=False)  # a $ in a name begins no formula
    figure.savefig(folder / "curves.png", dpi=100)
    return folder / "curves.png"


def _loss(axis: Any, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    """Draws the losses: smoothed with the raw line behind, and a mark where one is above the end of the axis."""
    steps, raw = _columns(train, "loss")
    at, validated = _columns(validation, "validation_loss")
    kept = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), _POINTS)).astype(np.int64))
    smooth = smoothed(raw, kept)
    axis.plot(steps, raw, color=_TRAIN, alpha=0.3, linewidth=0.8)
    axis.plot([steps[i] for i in kept], smooth, color=_TRAIN, label="train")
    axis.plot(at, validated, "o", color=_VALIDATION, markersize=4, label="validation")
    low, high = limits([smooth, validated], behind=[raw])
    margin = 0.04 * (high - low)
    # The numbers of one kind are below the marks, those of the other above: both have one at the first steps.
    for x, y, color, offset in ((steps, raw, _TRAIN, -10), (at, validated, _VALIDATION, 4)):
        above = beyond(y, high + margin)
        axis.plot([x[i] for i in above], [high] * len(above), "^", color=color, markersize=7, clip_on=False)
        for i in above[:3]:
            axis.annotate(f"{y[i]:.3g}", (x[i], high), (4, offset), textcoords="offset points", fontsize=7, color=color)
    axis.set_ylim(low - margin, high + margin)
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


def _columns(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]
