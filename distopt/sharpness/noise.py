"""The loss under noise on the weights."""

from __future__ import annotations

from distopt.bounds import integer, number
from distopt.sharpness.directions import gaussian
from distopt.sharpness.mean import Mean
from distopt.sharpness.objective import Objective


def noisy_loss(objective: Objective, relative: float, draws: int = 10, seed: int = 0) -> Mean:
    r"""Estimates the mean loss under Gaussian noise of each parameter's own size.

        p <- p + relative * |p| * n / |n|     n is standard normal; the norms are those of the full parameter

    A seed gives the same noise at every number of ranks.

    Args:
        objective: The loss.
        relative: The norm of the noise of each parameter, in units of the parameter's norm; > 0.
        draws: The number of draws of the noise, >= 1; each costs a forward pass.
        seed: The seed of the first draw.

    Raises:
        ValueError: If an argument is out of bounds.
    """
    number(0, above=True).check("relative", relative, "without noise it is the loss itself")
    integer(1).check("draws", draws)
    sizes = objective.layer_norms(objective.weights())
    losses = []
    for draw in range(draws):
        noise = gaussian(objective, seed + draw)
        scales = (relative * sizes / objective.layer_norms(noise).clamp(min=1e-300)).tolist()
        with objective.moved((1.0, [n * scale for n, scale in zip(noise, scales)])):
            losses.append(objective.value())
    return Mean.of(losses)
