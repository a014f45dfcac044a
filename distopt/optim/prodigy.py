"""Prodigy: Adam that estimates its learning rate from the distance travelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout
from distopt.optim.adaptation import DistanceAdapted, each


class Prodigy(DistanceAdapted):
    r"""Prodigy: Adam whose steps are multiplied by d, an estimate of the distance from the start x0 to a solution.

        m <- beta1 * m + (1 - beta1) * d * g
        v <- beta2 * v + (1 - beta2) * (d * g)^2
        s <- beta3 * s + (1 - beta3) * lr * d^2 * g                   beta3 = sqrt(beta2)
        r <- beta3 * r + (1 - beta3) * lr * d^2 * <g, x0 - p>         over all layers of all param groups
        direction = d * m / (sqrt(v) + d * eps) + d * weight_decay * p
        p <- p - lr * direction
        d <- max(d, d_coef * r / |s|_1)                               for the next step

    As Algorithm 4 of the paper, with decoupled weight decay. The two sums over all layers are one all-reduce per
    sharded mesh axis. lr is a factor, best left at 1 or moved by a schedule that ends at 0. The authors' code differs
    in one way: it multiplies eps by the d of the next step. Its options safeguard_warmup, growth_rate, slice_p and
    use_bias_correction are not here. A parameter without a gradient takes no part in either sum.

    State: `exp_avg`, `exp_avg_sq`, `s`, and `p0`, which is x0: 16 bytes per parameter. `param_groups[0]["d"]` is d.

    Args:
        params: Parameters, or param groups as dicts; they may differ in weight_decay and eps.
        lr: Factor of the estimated rate, >= 0; a number, or a tensor with one element on the CPU.
        betas: Decay of the two moments, each in [0, 1).
        eps: Keeps the quotient finite, >= 0.
        weight_decay: Decay of the weights, >= 0.
        d0: The first d, > 0; too small costs a few steps, too large is never taken back.
        d_coef: Factor of the estimate, > 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Must be False.
        trust_clip: Without effect.
        capturable: Must be False.
        torch_options: Options of torch's that change nothing here.

    Reference: Mishchenko, Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner, ICML 2024,
    arXiv 2306.06101.
    """

    def rule(self, group: dict[str, Any]) -> Rule:
        beta1, beta2 = group["betas"]
        scalars = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
        return Rule(buffers=("exp_avg", "exp_avg_sq", "s", "p0"), scalars=scalars)

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        return layout.master(param) if name == "p0" else super().init_slot(layout, group, name, param)

    def factors(self, shards: Shards) -> list[tuple[list[Tensor], list[Tensor]]]:
        s, d, beta3 = shards.buffers["s"], self.d(shards.group), self.beta3(shards.group)
        torch._foreach_mul_(s, beta3)
        steps = torch._foreach_mul(shards.grads, each((1.0 - beta3) * shards.group["lr"] * d * d, s))
        torch._foreach_add_(s, steps)
        travelled = torch._foreach_sub(shards.buffers["p0"], shards.params)
        return [(shards.grads, list(travelled)), (s, list(torch._foreach_sign(s)))]

    def directions(self, shards: Shards) -> list[Tensor]:
        b, c = shards.buffers, shards.rule.scalars
        d = each(self.d(shards.group), shards.params)
        grads = torch._foreach_mul(shards.grads, d)
        torch._foreach_lerp_(b["exp_avg"], grads, 1.0 - c["beta1"])
        torch._foreach_mul_(b["exp_avg_sq"], c["beta2"])
        torch._foreach_addcmul_(b["exp_avg_sq"], grads, grads, 1.0 - c["beta2"])
        scale = torch._foreach_sqrt(b["exp_avg_sq"])
        torch._foreach_add_(scale, torch._foreach_mul(d, c["eps"]))
        directions = torch._foreach_div(b["exp_avg"], scale)
        torch._foreach_add_(directions, shards.params, alpha=c["weight_decay"])
        torch._foreach_mul_(directions, d)
        return list(directions)

    def estimate(self, group: dict[str, Any], numerator: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        travelled, norm = totals
        beta3, d = self.beta3(group), self.d(group)
        numerator = beta3 * numerator + (1.0 - beta3) * float(group["lr"]) * d * d * travelled
        return numerator, group["d_coef"] * numerator / norm
