"""Preconditioned SAM: a neighbourhood in the units of the optimizer's second moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout, fit
from distopt.sam.base import SAM
from distopt.sam.checks import buffers_of, positive

_NAMES = ("exp_avg_sq", "square_avg", "sum")


class PreconditionedSAM(SAM):
    r"""SAM that perturbs along the gradient as an adaptive optimizer scales it, for language models.

        d = g / (sqrt(v) + eps)          v is the optimizer's mean (or sum) of squared gradients
        p <- p + rho * d / |d|

    Plain SAM moves language models mostly along few large gradients (those of the logits), and often makes them worse;
    the paper finds that preconditioning the perturbation helps. The norm |d|, over all parameters and ranks, makes the
    perturbation's length rho, and Adam's bias correction, one factor for all, drop out. Parameters that the optimizer
    has not stepped yet have v = 0. Under ZeRO-1 each rank moves its rows and sends them to the others.

    Args: as `SAM`, and
        eps: > 0.

    Raises ValueError for an optimizer without second moments.

    Reference: Singh, Mobahi, Agarwala, Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM,
    ICML 2025, arXiv 2502.02407.
    """

    uses_state = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        eps: float = 1e-8,
        interval: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, rho, interval, model=model)
        self.eps = positive("eps", eps)
        if self.uses_state and not buffers_of(optimizer) & set(_NAMES):
            raise ValueError(f"{type(optimizer).__name__} has no second moments: use Adam, AdamW, LAMB or RMSprop")

    def ascent(self, layout: ShardLayout, owners: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        directions = []
        for p in owners:
            grads, state = layout.grads([p]), self.state.get(p, {})
            moment = next((fit(layout, p, state[n], n) for n in _NAMES if n in state), None)
            # As state has them: in float16 eps would be 0.
            moments = layout.split(p, layout.zeros(p) if moment is None else moment)
            directions += [g / v.sqrt().add_(self.eps) for g, v in zip(grads, moments)]
        return directions, directions
