"""D-Adaptation: Adam that estimates its learning rate from the distance to a solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.adaptation import DistanceAdapted, each


class DAdaptAdam(DistanceAdapted):
    r"""D-Adaptation for Adam: steps are multiplied by d, an estimate of the distance from the start to a solution.

        m <- beta1 * m + (1 - beta1) * d * g
        v <- beta2 * v + (1 - beta2) * g^2                            a = sqrt(v) + eps
        r <- beta3 * r + (1 - beta3) * lr * d * <g, s / a>            over all layers of all param groups
        s <- beta3 * s + (1 - beta3) * lr * d * g                     beta3 = sqrt(beta2)
        direction = m / a + d * weight_decay * p
        p <- p - lr * direction
        d <- max(d, d_coef * r / ((1 - beta3) * |s|_1))               for the next step

    As the paper's variant for Adam, with decoupled weight decay, and with lr outside of m, which is the same while lr
    is constant. The bound is proved for gradient descent and AdaGrad only: for Adam, d may exceed the distance. The two
    sums over all layers are one all-reduce per sharded mesh axis. `Prodigy` is its successor.

    State: `exp_avg`, `exp_avg_sq` and `s`, 12 bytes per parameter. `param_groups[0]["d"]` is d.

    Args:
        params: As for `Prodigy`, like all others.
        lr: Factor of the estimated rate, >= 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Keeps the quotient finite, >= 0.
        weight_decay: Decay of the weights, >= 0.
        d0: The first d, > 0.
        d_coef: Factor of the estimate, > 0; 1 in the paper.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Must be False.
        trust_clip: Without effect.
        capturable: Must be False.
        torch_options: Options of torch's that change nothing here.

    Reference: Defazio, Mishchenko, Learning-Rate-Free Learning by D-Adaptation, ICML 2023, arXiv 2301.07733.
    """

    def rule(self, group: dict[str, Any]) -> Rule:
        beta1, beta2 = group["betas"]
        scalars = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
        return Rule(buffers=("exp_avg", "exp_avg_sq", "s"), scalars=scalars)

    def factors(self, shards: Shards) -> list[tuple[list[Tensor], list[Tensor]]]:
        b, c, s, beta3 = shards.buffers, shards.rule.scalars, shards.buffers["s"], self.beta3(shards.group)
        torch._foreach_mul_(b["exp_avg_sq"], c["beta2"])
        torch._foreach_addcmul_(b["exp_avg_sq"], shards.grads, shards.grads, 1.0 - c["beta2"])
        before = torch._foreach_div(s, self._scale(shards))
        torch._foreach_mul_(s, beta3)
        steps = torch._foreach_mul(shards.grads, each((1.0 - beta3) * shards.group["lr"] * self.d(shards.group), s))
        torch._foreach_add_(s, steps)
        return [(shards.grads, list(before)), (s, list(torch._foreach_sign(s)))]

    def directions(self, shards: Shards) -> list[Tensor]:
        b, c = shards.buffers, shards.rule.scalars
        d = each(self.d(shards.group), shards.params)
        torch._foreach_lerp_(b["exp_avg"], torch._foreach_mul(shards.grads, d), 1.0 - c["beta1"])
        directions = torch._foreach_div(b["exp_avg"], self._scale(shards))
        decay = torch._foreach_mul(shards.params, d)
        torch._foreach_add_(directions, decay, alpha=c["weight_decay"])
        return list(directions)

    def estimate(self, group: dict[str, Any], numerator: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        inner, norm = totals
        beta3 = self.beta3(group)
        numerator = beta3 * numerator + (1.0 - beta3) * float(group["lr"]) * self.d(group) * inner
        return numerator, group["d_coef"] * numerator / ((1.0 - beta3) * norm)

    def _scale(self, shards: Shards) -> list[Tensor]:
        """Returns a."""
        scale = torch._foreach_sqrt(shards.buffers["exp_avg_sq"])
        torch._foreach_add_(scale, shards.rule.scalars["eps"])
        return list(scale)
