"""The table and the picture of a comparison."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTH = 80


@dataclass(frozen=True)
class Result:
    """The tuned settings of one row, and its losses.

    Attributes:
        name: The row.
        settings: The values that the search has chosen, by key.
        losses: The losses of the runs that are compared, one of each seed; inf where a run diverged.
        searched: The scale of the learning rate and the loss of each run of the first rung.
    """

    name: str
    settings: dict[str, str]
    losses: list[float]
    searched: list[tuple[float, float]]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """The sample standard deviation over the seeds; nan for fewer than two or a run that diverged."""
        finite = len(self.losses) > 1 and all(map(math.isfinite, self.losses))
        return statistics.stdev(self.losses) if finite else math.nan

    @property
    def tuned(self) -> str:
        """The settings in one line, by the last part of each key."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())


def ranked(results: Sequence[Result]) -> list[Result]:
    """Return the rows, the smallest mean first."""
    return sorted(results, key=lambda result: (math.isnan(result.mean), result.mean))


def verdict(results: Sequence[Result]) -> str:
    """Return which rows are within two standard errors of the difference to the best one."""
    best, *others = ranked(results)
    near = [
        other.name
        for other in others
        if other.mean - best.mean <= 2 * math.sqrt((best.deviation**2 + other.deviation**2) / max(1, len(best.losses)))
    ]
    if len(best.losses) < 2:
        return "One seed has no deviation: differences may be noise."
    which = f"Within two standard errors of {best.name}: {', '.join(near)}" if near else f"{best.name} is the best"
    return f"{which}, at {len(best.losses)} seeds."


def printed(results: Sequence[Result]) -> str:
    """Return the table for a terminal of 80 columns."""
    wide = max(9, *(len(result.name) for result in results))
    head = f"{'':{wide}}  {'mean':>7}  {'sd':>6}  "
    lines = [f"{head}settings"]
    for result in ranked(results):
        left = f"{result.name:{wide}}  {result.mean:7.4f}  {result.deviation:6.4f}  "
        lines += textwrap.wrap(result.tuned, WIDTH, initial_indent=left, subsequent_indent=" " * len(left)) or [left]
    return "\n".join([*lines, *textwrap.wrap(verdict(results), WIDTH)])


def markdown(results: Sequence[Result]) -> str:
    """Return the table in Markdown."""
    lines = ["| | loss, mean | standard deviation | settings |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.mean:.4f} | {r.deviation:.4f} | `{r.tuned}` |" for r in ranked(results)]
    return "\n".join([*lines, "", verdict(results), ""])


def write(folder: Path, results: Sequence[Result]) -> None:
    """Write `comparison.md`, `comparison.json` and `comparison.png`."""
    (folder / "comparison.md").write_text(markdown(results))
    (folder / "comparison.json").write_text(json.dumps([asdict(result) for result in ranked(results)], indent=1) + "\n")
    draw(folder / "comparison.png", ranked(results))


def draw(file: Path, results: Sequence[Result]) -> None:
    """Draw mean, deviation and every seed of each row, and the search over the learning rate's scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, result in enumerate(results):
        color = f"C{i % 10}"
        finite = [loss for loss in result.losses if math.isfinite(loss)]
        left.plot(finite, [i] * len(finite), "o", color=color, alpha=0.5, markersize=4)
        if math.isfinite(result.deviation):
            left.errorbar(result.mean, i, xerr=result.deviation, color=color, marker="|", capsize=4)
        best: dict[float, float] = {}
        for scale, loss in result.searched:
            if math.isfinite(loss):
                best[scale] = min(loss, best.get(scale, math.inf))
        right.plot(
            *zip(*sorted(best.items())) if best else ([], []),
            "-" if i < 10 else "--",
            marker=".",
            color=color,
            label=result.name,
        )
    left.set_yticks(range(len(results)), [result.name for result in results])
    left.invert_yaxis()
    left.set(title="Each tuned: seeds, mean, standard deviation", xlabel="final loss")
    right.set(title="Search, first rung: the best at each scale", xlabel="scale of the learning rate", ylabel="loss")
    right.set_xscale("log")
    right.legend(fontsize=7, ncols=2)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
