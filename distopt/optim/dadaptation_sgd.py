"""D-Adaptation: SGD that estimates its learning rate from the distance to a solution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.adaptation import DistanceAdapted, each
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import TORCH_OPTIONS, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


class DAdaptSGD(DistanceAdapted):
    r"""D-Adaptation for SGD: steps are multiplied by d, an estimate of the distance from the start to a solution.

        g <- g + weight_decay * p                                     G = |g| of the first step, over all layers
        r <- r + lr * d * <g, s>                                      over all layers of all param groups
        s <- s + lr * d * g
        m <- momentum * m + (1 - momentum) * d / G * g
        p <- p - lr * m
        d <- max(d, d_coef * 2 r / (G |s|))                           for the next step

    As Algorithm 4 of the paper, whose s is ours divided by G, and whose x <- momentum * x + (1 - momentum) * z, with
    z <- z - lr * d / G * g, is the same while lr is constant. The three sums over all layers are one all-reduce per
    sharded mesh axis. A first step without any gradient but 0 sets no G and moves nothing.

    State: `momentum_buffer` and `s`, 8 bytes per parameter. `param_groups[0]["d"]` is d, and `g_norm` is G.

    Args:
        params: Parameters, or param groups as dicts; they may differ in weight_decay.
        lr: Factor of the estimated rate, >= 0; a number, or a tensor with one element on the CPU.
        momentum: Decay of the momentum, in [0, 1).
        weight_decay: Factor of the weights in the gradient, >= 0.
        d0: The first d, > 0.
        d_coef: Factor of the estimate, > 0; 1 in the paper.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Must be False.
        trust_clip: Without effect.
        capturable: Must be False.
        torch_options: Options of torch's that change nothing here.

    Reference: Defazio, Mishchenko, Learning-Rate-Free Learning by D-Adaptation, ICML 2023, arXiv 2301.07733.
    """

    torch_options = TORCH_OPTIONS
    group_state = ("d", "d_numerator", "g_norm")
    inner_products = 3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        empty = dict.fromkeys(self.group_state)
        ShardedOptimizer.__init__(self, params, options(locals()) | empty, **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            buffers=("momentum_buffer", "s"),
            scalars={"momentum": group["momentum"], "penalty": group["weight_decay"]},
            penalty="penalty",
        )

    def factors(self, shards: Shards) -> list[tuple[list[Tensor], list[Tensor]]]:
        s, grads = shards.buffers["s"], _penalized(shards)
        before = [value.clone() for value in s]
        steps = torch._foreach_mul(grads, each(shards.group["lr"] * self.d(shards.group), s))
        torch._foreach_add_(s, steps)
        return [(grads, before), (s, s), (grads, grads)]

    def prepare(self, totals: Tensor) -> None:
        first = self.param_groups[0]["g_norm"]
        norm = torch.as_tensor(0.0 if first is None else first, dtype=torch.float64).to(totals.device)
        norm = torch.where(norm > 0, norm, totals[2].sqrt())
        for group in self.param_groups:
            group["g_norm"] = norm

    def directions(self, shards: Shards) -> list[Tensor]:
        m, momentum = shards.buffers["momentum_buffer"], shards.rule.scalars["momentum"]
        norm = self.param_groups[0]["g_norm"]
        rate = torch.where(norm > 0, self.d(shards.group) / norm, 0.0)
        steps = torch._foreach_mul(_penalized(shards), each(rate, m))
        torch._foreach_lerp_(m, steps, 1.0 - momentum)
        return [value.clone() for value in m]

    def estimate(self, group: dict[str, Any], numerator: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        numerator = numerator + float(group["lr"]) * self.d(group) * totals[0]
        return numerator, group["d_coef"] * 2.0 * numerator / (group["g_norm"] * totals[1].sqrt())


def _penalized(shards: Shards) -> list[Tensor]:
    """Returns the gradients with the L2 penalty."""
    if penalty := shards.rule.scalars["penalty"]:
        return list(torch._foreach_add(shards.grads, shards.params, alpha=penalty))
    return shards.grads
