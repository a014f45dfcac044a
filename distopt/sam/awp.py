"""AWP: adversarial weight perturbation, with a neighbourhood of each layer's own size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout
from distopt.sam.base import SAM
from distopt.sam.perturbing import Scope

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class AWP(SAM):
    r"""Adversarial weight perturbation: every layer moves up its own gradient, by a share of its own norm.

        p <- p + rho * |p| * g / |g|     both norms are those of the one parameter

    The paper has it inside of adversarial training: the closure's loss is that of adversarial examples
    (`distopt.robustness.pgd`), which the second pass reuses. Its gamma is `rho` here, and its single ascent step, which
    its experiments use, is taken from the weights themselves; the authors' code takes it by a step of SGD on a copy, to
    the same point. Their code leaves out the parameters of one axis (biases, the scales of norm layers); here they
    move too, unless their param group has `sam_rho=0`. A parameter that is zero, or whose gradient is, does not move.

    Takes two all-reduces per mesh axis that shards where SAM takes one.

    Args:
        optimizer: As for `SAM`. A param group's `sam_rho` is the share of its layers.
        interval: As for `SAM`.
        scope: As for `SAM`.
        model: As for `SAM`.
        rho: The length of a layer's move in units of the layer's norm, > 0; 0.005 in the paper.

    Reference: Wu, Xia, Wang, Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020,
    arXiv 2004.05884.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.005,
        *,
        interval: int = 1,
        scope: Scope = "global",
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, scope=scope, model=model, **schedule)

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights, grads, layers = layout.weights(params), layout.grads(params), layout.layers(params)
        weight_norms, grad_norms = layout.norms(layers, weights, grads)
        lengths = torch.where(grad_norms == 0.0, 0.0, weight_norms / grad_norms)  # NaN and inf pass on, to be seen
        return [g * lengths[layer].to(g.dtype) for g, layer in zip(grads, layers)], grads

    def _factors(self, layout: ShardLayout, params: list[Tensor], total: Tensor) -> list[Tensor]:
        """Returns rho for each shard: the directions have their lengths already."""
        rho = {p: self.radius_now(group) for group in self.param_groups for p in group["params"]}
        return [total.new_tensor(rho[p]) for p in params for _ in layout.segments[p]]
