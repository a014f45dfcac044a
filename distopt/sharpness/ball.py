"""The worst loss in a ball around the weights."""

from __future__ import annotations

from dataclasses import dataclass

from distopt.bounds import integer, number
from distopt.sharpness.directions import gaussian
from distopt.sharpness.objective import Objective, Vector


@dataclass(frozen=True)
class WorstLoss:
    """The largest loss that an ascent has found.

    Attributes:
        loss: The loss at the weights.
        worst: The largest loss found in the ball, and so a lower bound of the largest; at least `loss`.
        path: The loss after each step; the first is that at SAM's point, w + rho * g / |g|.
    """

    loss: float
    worst: float
    path: tuple[float, ...]

    @property
    def sharpness(self) -> float:
        """The rise of the loss, which SAM minimizes."""
        return self.worst - self.loss


def worst_loss(objective: Objective, rho: float, steps: int = 10, seed: int = 0) -> WorstLoss:
    r"""Searches the largest loss within a distance of the weights, by normalized ascent with projection.

        e <- rho * g / |g|                                g is the gradient at w
        e <- P(e + rho * g / |g|)                         g is the gradient at w + e; P projects onto |e| <= rho

    The norm is over all weights and ranks. Where the loss is convex no step descends. If the gradient at the weights is
    zero the first step is along a random direction.

    Args:
        objective: The loss.
        rho: The radius, > 0, in units of the 2-norm of all weights.
        steps: The number of ascent steps, >= 1; each costs a gradient.
        seed: The seed of the random direction.

    Raises:
        ValueError: If an argument is out of bounds.

    Reference: Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412, whose single step this repeats.
    """
    number(0, above=True).check("rho", rho, "at rho = 0 it is the loss itself")
    integer(1).check("steps", steps)
    loss, gradient = objective.value_and_gradient()
    move = _of_length(objective, gradient, rho) or _of_length(objective, gaussian(objective, seed), rho)
    path: list[float] = []
    for step in range(steps):
        with objective.moved((1.0, move)):
            if step == steps - 1:
                path.append(objective.value())
                break
            value, gradient = objective.value_and_gradient()
        path.append(value)
        along = _of_length(objective, gradient, rho)
        if not along:
            break
        further = [e + a for e, a in zip(move, along)]
        move = further if objective.norm(further) <= rho else _of_length(objective, further, rho)
    return WorstLoss(loss, max(loss, *path), tuple(path))


def _of_length(objective: Objective, vector: Vector, length: float) -> Vector:
    """A vector's multiple of a length; empty if it is zero."""
    norm = objective.norm(vector)
    return [v * (length / norm) for v in vector] if norm > 0.0 else []
