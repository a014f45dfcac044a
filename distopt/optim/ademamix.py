"""AdEMAMix: AdamW with a second, slow average of the gradient."""

from __future__ import annotations

import math
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


def ademamix(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_slow: list[Tensor],
    *,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    eps: float,
    decoupled: float,
    one_minus_beta3: list[float],
    slow_weight: list[float],
    bias_correction1: list[float],
    bias_correction2_sqrt: list[float],
) -> list[Tensor]:
    """Computes the directions of `AdEMAMix`, and updates its three averages in place.

    Args:
        params: The weights.
        grads: The gradients.
        exp_avg: The fast average m1.
        exp_avg_sq: The average v of the squares.
        exp_avg_slow: The slow average m2.
        one_minus_beta1: 1 - beta1.
        beta2: Decay of v.
        one_minus_beta2: 1 - beta2.
        eps: Keeps the quotient finite.
        decoupled: Weight decay that is added to the direction.
        one_minus_beta3: 1 - beta3 of each tensor, at its step.
        slow_weight: The weight alpha of m2 for each tensor, at its step.
        bias_correction1: 1 - beta1^step of each tensor.
        bias_correction2_sqrt: sqrt(1 - beta2^step) of each tensor.
    """
    torch._foreach_lerp_(exp_avg, grads, one_minus_beta1)
    torch._foreach_lerp_(exp_avg_slow, grads, one_minus_beta3)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, one_minus_beta2)
    scale = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(scale, bias_correction2_sqrt)
    torch._foreach_add_(scale, eps)
    directions = torch._foreach_div(exp_avg, bias_correction1)
    torch._foreach_add_(directions, torch._foreach_mul(exp_avg_slow, slow_weight))
    torch._foreach_div_(directions, scale)
    if decoupled:
        torch._foreach_add_(directions, params, alpha=decoupled)
    return list(directions)


class AdEMAMix(ShardedOptimizer):
    r"""AdEMAMix: AdamW whose direction has a second average of the gradient, over tens of thousands of steps.

        m1 <- beta1 * m1 + (1 - beta1) * g               m1_hat = m1 / (1 - beta1^step)
        m2 <- beta3(step) * m2 + (1 - beta3(step)) * g
        v  <- beta2 * v + (1 - beta2) * g^2              v_hat = v / (1 - beta2^step)
        direction = (m1_hat + alpha(step) * m2) / (sqrt(v_hat) + eps) + weight_decay * p
        p <- p - lr * direction

        alpha(step) = slow_weight * min(step / slow_warmup, 1)
        1 / ln beta3(step) = (1 - s) / ln beta1 + s / ln beta3,   s = min(step / slow_warmup, 1)

    As Algorithm 1 of the paper and its authors' code; the second line of the schedule is the paper's, written for the
    half-life, which it raises linearly. The paper's alpha is `slow_weight` here, and its T_alpha and T_beta3, which it
    sets to the number of steps, are both `slow_warmup`; without one, both start at their end values, which the paper
    finds to diverge early. m2 has no bias correction. The state has three values for each weight. The code's 1e-8 in
    the logarithm, against a beta1 of 0, is not needed here: its half-life is 0.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        betas: Decay of the fast average and of the squares, each in [0, 1).
        beta3: Decay of the slow average, in [0, 1).
        slow_weight: The weight of the slow average, >= 0; the default is the authors' code's.
        slow_warmup: Steps over which both are raised, >= 1; None for none. The count is the parameter's own.
        eps: Keeps the quotient finite, >= 0.
        weight_decay: Decoupled decay of the weights, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs; refused, as the rule has no kernel.
        torch_options: Options of torch's that change nothing here, and the cautious options of `ShardedOptimizer`.

    Reference: Pagliardini, Ablin, Grangier, The AdEMAMix Optimizer: Better, Faster, Older, ICLR 2025,
    arXiv 2409.03137.
    """

    torch_options = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9999,
        slow_weight: float = 2.0,
        slow_warmup: int | None = None,
        eps: float = 1e-8,
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
        (beta1, beta2), beta3, weight = group["betas"], group["beta3"], group["slow_weight"]
        warmup = group["slow_warmup"] or 1
        return Rule(
            buffers=("exp_avg", "exp_avg_sq", "exp_avg_slow"),
            signed=("exp_avg", "exp_avg_slow"),
            squares=("exp_avg_sq",),
            decay="decoupled",
            scalars={
                "one_minus_beta1": 1.0 - beta1,
                "beta2": beta2,
                "one_minus_beta2": 1.0 - beta2,
                "eps": group["eps"],
                "decoupled": group["weight_decay"],
            },
            scales={
                "one_minus_beta3": lambda step: 1.0 - _between(beta1, beta3, min(step / warmup, 1.0)),
                "slow_weight": lambda step: weight * min(step / warmup, 1.0),
            },
            divisors={
                "bias_correction1": lambda step: 1.0 - beta1**step,
                "bias_correction2_sqrt": lambda step: (1.0 - beta2**step) ** 0.5,
            },
        )

    def directions(self, shards: Shards) -> list[Tensor]:
        return ademamix(shards.params, shards.grads, **shards.inputs)


def _between(start: float, end: float, share: float) -> float:
    """Returns the decay whose half-life lies between those of two others."""
    if share == 1.0:
        return end
    half_life = (1.0 - share) * _half_life(start) + share * _half_life(end)
    return 0.5 ** (1.0 / half_life) if half_life else 0.0


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta) if beta else 0.0
