"""Friendly-SAM: perturbs along the noise of the gradient of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout
from distopt.optim.validate import bounded
from distopt.sam.base import SAM
from distopt.sam.perturbation import resolution

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class FriendlySAM(SAM):
    r"""Friendly-SAM: perturbs along the noise of the batch's gradient, without the mean of earlier gradients.

        m <- lambda * m + (1 - lambda) * g
        d = g - sigma * m
        p <- p + rho * d / |d|

    The mean m is stored in the optimizer's state as `sam_mean`, sharded like that state, and changes when the step is
    taken. It starts at 0 and includes g, as in the paper; the authors' code starts it at the first g and uses the mean
    of earlier steps. Under a loss scale (fp16) divide the gradients by it before `perturb`: m outlives the scale.
    `distopt.attach` and `SAMTrainerMixin` raise ValueError under one; in other loops a scale cannot be detected.
    While gradients do not change, d is what rounding leaves of m: up to the relative precision of the gradients over
    1 - lambda, |d| counts as 0, and the weights are not perturbed.

    Args:
        optimizer: As for `SAM`.
        rho: As for `SAM`.
        interval: As for `SAM`.
        model: As for `SAM`.
        sigma: The share of the mean that is subtracted, in [0, 1]; 1 in the paper, 0 is SAM.
        decay: The lambda of the formula, in [0, 1].

    Reference: Li, Zhou, He, Cheng, Huang, Friendly Sharpness-Aware Minimization, CVPR 2024, arXiv 2403.12350.
    """

    mixes_gradients_of_steps = True
    reads_optimizer_state = True
    buffers = ("sam_mean",)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        decay: float = 0.6,
        interval: int = 1,
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, model=model, **schedule)
        self.sigma = bounded("sigma", sigma, 0.0, 1.0)
        self.decay = bounded("decay", decay, 0.0, 1.0)

    def rounding(self, params: list[Tensor]) -> float:
        return resolution(params) / max(0.01, 1.0 - self.decay)  # each step's rounding of m lasts 1 / (1 - lambda)

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        grads, means = layout.grads(params), self._state_buffers.shards(layout, params, "sam_mean")
        means = [torch.lerp(m, g.to(m.dtype), 1.0 - self.decay) for m, g in zip(means, grads)]
        self._state_buffers.stage(layout, params, "sam_mean", means)
        directions = [g - self.sigma * m for g, m in zip(grads, means)]
        return directions, directions
