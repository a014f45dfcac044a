"""LookSAM: the second gradient at every k-th step, reused in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.kernels import exact
from distopt.layout import ShardLayout
from distopt.optim.validate import bounded
from distopt.sam.base import SAM
from distopt.sam.perturbation import gradient_pairs, rejections, resolution

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class LookSAM(SAM):
    r"""LookSAM: SAM's gradient at every k-th step, and in between the part of it that changes slowly.

        every k-th step:  g at p, and g' at p + rho g / |g|
                          v = g' - (g . g' / |g|^2) g            the part that leads to flat minima
                          step with g'
        the others:       step with g + alpha * (|g| / |v|) * v

    Inner products and norms are over all parameters and ranks. v is 0 where the angle between g and g' is below the
    relative precision of the gradients, as in a model with a single weight. v is stored in the optimizer's state as
    `sam_look`, laid out like the gradients. A step that ascends takes SAM's two passes, the others take one.

    Args:
        optimizer: As for `SAM`.
        rho: As for `SAM`.
        model: As for `SAM`.
        interval: The k of the formula, 5 in the paper.
        alpha: The weight of v, >= 0; with 0 the steps in between take plain gradients.

    Reference: Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022,
    arXiv 2203.02714.
    """

    needs_unperturbed_gradient = True
    always_descends = True
    buffers = ("sam_look",)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        interval: int = 5,
        alpha: float = 0.7,
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, model=model, **schedule)
        self.alpha = bounded("alpha", alpha, 0.0)

    def descent(
        self, layout: ShardLayout, params: list[Tensor], unperturbed: dict[Tensor, list[Tensor]] | None
    ) -> None:
        if unperturbed is not None:
            params = list(dict.fromkeys((*unperturbed, *params)))
            before, after = gradient_pairs(layout, params, unperturbed)
            pairs = (before, after), (before, before), (after, after)
            dot, square, square_after = map(exact.total, layout.dots(layout.layers(params), *pairs))
            along = torch.where(square > 0, dot / square, 0.0)
            # v of parallel gradients would be their rounding, which the steps in between would scale up to |g|.
            parallel = (square > 0) & (dot * dot >= (1.0 - resolution(params) ** 2) * square * square_after)
            for g, v in zip(before, rejections(after, along, before), strict=True):
                g.copy_(v.mul_(~parallel))
            self._state_buffers.stage(layout, params, "sam_look", before)
        else:
            grads, look = layout.grads(params), self._state_buffers.shards(layout, params, "sam_look")
            norms = layout.norms(layout.layers(params), grads, look)
            of_grads, of_look = (exact.norm(each) for each in norms)
            ratio = torch.where(of_look > 0, self.alpha * of_grads / of_look, 0.0)
            for g, v in zip(grads, look, strict=True):
                g.add_(v * ratio.to(v.dtype))
