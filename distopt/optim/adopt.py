"""ADOPT: Adam that scales a gradient by the squares of those before it."""

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


def adopt(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    eps: float,
    decoupled: list[float],
    clip: list[float],
) -> list[Tensor]:
    """Computes the directions of `ADOPT`, and updates both moments in place.

    Args:
        params: The weights.
        grads: The gradients.
        exp_avg: The average m of the scaled gradients.
        exp_avg_sq: The average v of the squares of the gradients before this one.
        one_minus_beta1: 1 - beta1.
        beta2: Decay of v.
        one_minus_beta2: 1 - beta2.
        eps: The least divisor.
        decoupled: Weight decay that is added to each tensor's direction.
        clip: The bound of each tensor's scaled gradient; 0 at its first step, which only sets v.
    """
    directions = [torch.zeros_like(g) for g in grads]
    for square, g in ((square, g) for square, g, bound in zip(exp_avg_sq, grads, clip) if not bound):
        square.copy_(g).square_()
    later = [i for i, bound in enumerate(clip) if bound]
    if not later:
        return directions
    params, grads, exp_avg, exp_avg_sq = ([column[i] for i in later] for column in (params, grads, exp_avg, exp_avg_sq))
    bounds = [clip[i] for i in later]
    scaled = torch._foreach_div(grads, torch._foreach_clamp_min(torch._foreach_sqrt(exp_avg_sq), eps))
    torch._foreach_clamp_max_(scaled, bounds)
    torch._foreach_clamp_min_(scaled, [-bound for bound in bounds])
    torch._foreach_lerp_(exp_avg, scaled, one_minus_beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, one_minus_beta2)
    for i, m, p in zip(later, exp_avg, params):
        torch.add(m, p, alpha=decoupled[i], out=directions[i])
    return directions


class ADOPT(ShardedOptimizer):
    r"""ADOPT: momentum on gradients that are divided by the root mean square of the gradients *before* them.

        c = (step - 1)^clip_exponent                     no bound if clip_exponent is None
        m <- beta1 * m + (1 - beta1) * clamp(g / max(sqrt(v), eps), -c, c)
        v <- beta2 * v + (1 - beta2) * g^2
        direction = m + weight_decay * p
        p <- p - lr * direction

    The first step of a parameter changes neither it nor m, and sets v = g^2. As Algorithm 2 of the paper (its clipped
    variant, with the authors' c_i = i^0.25), whose step i is our i + 1; `clip_exponent=None` is Algorithm 1. g and v
    are independent given the past, from which it converges at any beta2; Adam's need not. The weight decay is
    decoupled, the authors' `decouple=True`; like the authors' code, the first step does not decay either.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        betas: Decay of the two averages, each in [0, 1).
        eps: The least divisor, >= 0.
        weight_decay: Decoupled decay of the weights, >= 0.
        clip_exponent: The power of the step that bounds a scaled gradient, >= 0; None for no bound.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs; refused, as the rule has no kernel.
        torch_options: Options of torch's that change nothing here, and the cautious options of `ShardedOptimizer`.

    Reference: Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate, NeurIPS 2024,
    arXiv 2411.02853.
    """

    torch_options = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_exponent: float | None = 0.25,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        (beta1, beta2), exponent, weight_decay = group["betas"], group["clip_exponent"], group["weight_decay"]

        def clip(step: float) -> float:
            return 0.0 if step == 1.0 else math.inf if exponent is None else (step - 1.0) ** exponent

        return Rule(
            buffers=("exp_avg", "exp_avg_sq"),
            signed=("exp_avg",),
            squares=("exp_avg_sq",),
            decay="decoupled",
            scalars={
                "one_minus_beta1": 1.0 - beta1,
                "beta2": beta2,
                "one_minus_beta2": 1.0 - beta2,
                "eps": group["eps"],
            },
            scales={"clip": clip, "decoupled": lambda step: 0.0 if step == 1.0 else weight_decay},
        )

    def directions(self, shards: Shards) -> list[Tensor]:
        return adopt(shards.params, shards.grads, **shards.inputs)
