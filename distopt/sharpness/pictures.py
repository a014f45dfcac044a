"""The loss landscape of a checkpoint as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(
    file: Path, title: str, factors: Sequence[float], lines: dict[str, list[float]], plane: dict[str, Any] | None
) -> Path:
    """Draws the loss along lines and, where it was measured, on a plane.

    Args:
        file: The PNG file to write.
        title: What the picture is of.
        factors: The positions along the lines.
        lines: The losses along each line, in nats per token, by the line's name.
        plane: `factors`, and `losses` with a row for each step along the second direction; None for none.

    Returns:
        The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0 if plane else 4.8, 3.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if plane else 1, squeeze=False)[0]
    for name, losses in lines.items():
        axes[0].plot(factors, losses, label=name)
    axes[0].set(xlabel="distance in units of the filters' norms", ylabel="loss in nats per token")
    axes[0].set_title("Along a line", fontsize=10)
    axes[0].legend(fontsize=8)
    if plane:
        steps = plane["factors"]
        contours = axes[1].contourf(steps, steps, plane["losses"], levels=20)
        figure.colorbar(contours, ax=axes[1], label="loss in nats per token")
        axes[1].plot(0, 0, "w+")
        axes[1].set(xlabel="first random direction", ylabel="second random direction")
        axes[1].set_title("On a plane, filter-normalised", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)
    return file
