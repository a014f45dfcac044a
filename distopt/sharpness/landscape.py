"""Loss landscapes: the loss along a line and on a plane through the weights."""

from __future__ import annotations

from collections.abc import Sequence

from distopt.sharpness.objective import Objective, Vector


def line(objective: Objective, direction: Vector, factors: Sequence[float]) -> list[float]:
    """Computes the loss at w + a d for each factor a.

    Args:
        objective: The loss.
        direction: The direction d; for comparable pictures one of `filter_normalised`.
        factors: The values of a.
    """
    losses = []
    for a in factors:
        with objective.moved((a, direction)):
            losses.append(objective.value())
    return losses


def plane(objective: Objective, first: Vector, second: Vector, factors: Sequence[float]) -> list[list[float]]:
    """Computes the loss at w + a d + b e for each pair of factors.

    Args:
        objective: The loss.
        first: The direction d.
        second: The direction e.
        factors: The values of a, and those of b.

    Returns:
        A row for each b, with a value for each a.
    """
    rows = []
    for b in factors:
        row = []
        for a in factors:
            with objective.moved((a, first), (b, second)):
                row.append(objective.value())
        rows.append(row)
    return rows
