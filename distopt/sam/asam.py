"""ASAM: a neighbourhood that scales with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout
from distopt.optim.validate import bounded
from distopt.sam.base import SAM


class ASAM(SAM):
    r"""Adaptive SAM: the neighbourhood is wider along large weights, so that rescaling layers does not change it.

        t = |p| + eta               element-wise, for matrices and other weights; 1 for parameters of one axis
        p <- p + rho * t^2 g / |t g|

    The norm is over all parameters and ranks. The paper adapts what is called a weight; here parameters of at most one
    axis (biases, and the scales of norms) are not adapted.

    Args: as `SAM`, and
        rho: in units of relative change, 0.5 in the paper: ten times and more that of SAM.
        eta: >= 0, so that weights of zero move too.

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
        scope: str = "global",
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, scope=scope, model=model)
        self.eta = bounded("eta", eta, 0.0)

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        adapted = [p.ndim > 1 for p in params for _ in layout.segments[p]]
        weights, grads = layout.weights(params), layout.grads(params)
        scales = [w.abs().add_(self.eta) if adapt else torch.ones_like(w) for w, adapt in zip(weights, adapted)]
        measured = [t * g for t, g in zip(scales, grads)]
        return [t.mul_(m) for t, m in zip(scales, measured)], measured
