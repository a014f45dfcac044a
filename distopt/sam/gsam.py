"""GSAM: descend the perturbed loss and the surrogate gap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.kernels import exact
from distopt.layout import ShardLayout
from distopt.optim.validate import bounded
from distopt.sam.base import SAM
from distopt.sam.perturbation import gradient_pairs, rejections

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class GSAM(SAM):
    r"""Surrogate-gap SAM: minimizes the perturbed loss, and its gap to the loss where that does not conflict.

        perturb and second pass as SAM:  g at p, and g' at p + rho g / |g|
        g_perp = g - (g . g' / |g'|^2) g'          the part of g that does not change the perturbed loss
        step with g' - alpha * g_perp

    Inner products and norms are over all parameters and ranks: they cost one more all-reduce per mesh axis that shards,
    and one more copy of the gradients. The paper lets rho fall with the learning rate: set `rho` during training.

    Args:
        optimizer: As for `SAM`.
        rho: As for `SAM`.
        interval: As for `SAM`.
        model: As for `SAM`.
        alpha: The weight of g_perp, >= 0; 0 is SAM.

    Reference: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, Surrogate Gap Minimization Improves
    Sharpness-Aware Training, ICLR 2022, arXiv 2203.08065.
    """

    needs_unperturbed_gradient = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        alpha: float = 0.4,
        interval: int = 1,
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, model=model, **schedule)
        self.alpha = bounded("alpha", alpha, 0.0)

    def descent(
        self, layout: ShardLayout, params: list[Tensor], unperturbed: dict[Tensor, list[Tensor]] | None
    ) -> None:
        if unperturbed is None:  # a step that did not ascend
            return
        before, after = gradient_pairs(layout, params, unperturbed)
        dots, squares = layout.dots(layout.layers(params), (before, after), (after, after))
        dot, square = exact.total(dots), exact.total(squares)
        along = torch.where(square > 0, dot / square, 0.0)
        for second, perpendicular in zip(after, rejections(before, along, after), strict=True):
            second.sub_(perpendicular, alpha=self.alpha)
