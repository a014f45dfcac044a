"""ASAM: a neighbourhood that scales with the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout
from distopt.optim.validate import bounded
from distopt.sam.base import SAM
from distopt.sam.perturbing import Scope

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class ASAM(SAM):
    r"""Adaptive SAM: the neighbourhood is wider along large weights, and so invariant to rescaling of layers.

        t = |p| + eta               element-wise, for parameters of two axes or more; 1 for the others
        p <- p + rho * t^2 g / |t g|

    The norm is over all parameters and ranks. The paper adapts the parameters that are called a weight; here
    parameters of at most one axis (biases and the scales of norm layers) are not adapted.

    Args:
        optimizer: As for `SAM`.
        interval: As for `SAM`.
        scope: As for `SAM`.
        model: As for `SAM`.
        rho: The radius in units of relative change, 0.5 in the paper: at least ten times that of SAM.
        eta: An offset >= 0, which lets weights of zero move too.

    Reference: Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
    Neural Networks, ICML 2021, arXiv 2102.11600.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.5,
        *,
        eta: float = 0.01,
        interval: int = 1,
        scope: Scope = "global",
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, scope=scope, model=model, **schedule)
        self.eta = bounded("eta", eta, 0.0)

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        adapted = [p.ndim > 1 for p in params for _ in layout.segments[p]]
        weights, grads = layout.weights(params), layout.grads(params)
        scales = [w.abs().add_(self.eta) if adapt else torch.ones_like(w) for w, adapt in zip(weights, adapted)]
        measured = [t * g for t, g in zip(scales, grads)]
        return [t.mul_(m) for t, m in zip(scales, measured)], measured
