"""Preconditioned SAM: a neighbourhood in the units of the optimizer's second moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout, fit
from distopt.optim.validate import positive
from distopt.sam.base import SAM
from distopt.sam.moments import SECOND, moment_of, state_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class PreconditionedSAM(SAM):
    r"""SAM for language models, which perturbs along the gradient as an adaptive optimizer scales it.

        d = g / (sqrt(v) + eps)          v is the optimizer's mean (or sum) of squared gradients
        p <- p + rho * d / |d|

    SAM moves language models mostly along a few large gradients (those of the logits), and often makes them worse;
    the paper finds that preconditioning the perturbation helps. The norm |d|, over all parameters and ranks, makes the
    perturbation's length rho, and Adam's bias correction, one factor for all, drop out. Parameters that the optimizer
    has not stepped yet have v = 0. Under ZeRO-1 each rank moves the rows that it owns and sends them to the others.

    Args:
        optimizer: As for `SAM`.
        rho: As for `SAM`.
        interval: As for `SAM`.
        model: As for `SAM`.
        eps: A constant > 0 in the denominator.

    Raises:
        ValueError: If the optimizer has no second moment per element (Adafactor's are per row and column): on
            construction or, around an optimizer that is neither distopt's nor torch's, at the second step.

    Reference: Singh, Mobahi, Agarwala, Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM,
    ICML 2025, arXiv 2502.02407.
    """

    reads_optimizer_state = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        eps: float = 1e-8,
        interval: int = 1,
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, model=model, **schedule)
        self.eps = positive("eps", eps)
        if self.reads_optimizer_state and any(each.isdisjoint(SECOND) for each in state_names(optimizer)):
            raise self._no_moments()

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        directions = []
        for p in params:
            grads, moment = layout.grads([p]), self._moment(p)
            # In the dtype of the state: in float16 eps would be 0.
            stored = layout.zeros(p) if moment is None else fit(layout, p, moment, "the second moment")
            moments = layout.split(p, stored)
            directions += [g / v.sqrt().add_(self.eps) for g, v in zip(grads, moments, strict=True)]
        return directions, directions

    def _moment(self, param: Tensor) -> Tensor | None:
        """Returns the second moment, None before the first step; raises ValueError if a step made none."""
        state = self.state.get(param, {})
        moment = moment_of(state, SECOND, param)
        if moment is None and (state or (self._has_stepped and not self.state)):
            raise self._no_moments()
        return moment

    def _no_moments(self) -> ValueError:
        return ValueError(f"{type(self.optimizer).__name__} has no second moments: use Adam, AdamW, LAMB or RMSprop")
