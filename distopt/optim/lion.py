"""Lion: the sign of an average of momentum and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    decoupled: float,
) -> list[Tensor]:
    """Computes the directions of `Lion`, and updates its momentum in place.

    Args:
        params: The weights.
        grads: The gradients.
        exp_avg: The momentum m.
        one_minus_beta1: 1 - beta1.
        one_minus_beta2: 1 - beta2.
        decoupled: Weight decay that is added to the direction.
    """
    directions = list(torch._foreach_lerp(exp_avg, grads, one_minus_beta1))
    torch._foreach_sign_(directions)
    torch._foreach_lerp_(exp_avg, grads, one_minus_beta2)
    if decoupled:
        torch._foreach_add_(directions, params, alpha=decoupled)
    return directions


class Lion(ShardedOptimizer):
    r"""Lion: the sign of an average of momentum and gradient, so that every element moves by lr.

        direction = sign(beta1 * m + (1 - beta1) * g) + weight_decay * p
        m <- beta2 * m + (1 - beta2) * g
        p <- p - lr * direction

    As Algorithm 2 of the paper, whose defaults are those here. It advises an lr of a third to a tenth of AdamW's, and
    a weight decay so much larger. It keeps one value for each weight where Adam keeps two. The sign of 0 is 0. Where
    the average is near 0, rounding decides the sign: with the same gradients up to rounding, two runs may take steps
    of lr in opposite directions there.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        betas: The share of the momentum in the direction, and the decay of the momentum, each in [0, 1).
        weight_decay: Decoupled decay of the weights, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs; refused, as the rule has no kernel.
        torch_options: Options of torch's that change nothing here, and the cautious options of `ShardedOptimizer`.

    Reference: Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675.
    """

    torch_options = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            buffers=("exp_avg",),
            signed=("exp_avg",),
            decay="decoupled",
            scalars={
                "one_minus_beta1": 1.0 - beta1,
                "one_minus_beta2": 1.0 - beta2,
                "decoupled": group["weight_decay"],
            },
        )

    def directions(self, shards: Shards) -> list[Tensor]:
        return lion(shards.params, shards.grads, **shards.inputs)
