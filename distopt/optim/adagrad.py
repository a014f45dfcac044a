"""Adagrad: scale each coordinate by the root of its summed squared gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import compiled
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout, local
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def adagrad(
    params: list[Tensor],
    grads: list[Tensor],
    sum: list[Tensor],
    *,
    weight_decay: float,
    eps: float,
    rate_decay: list[float],
) -> list[Tensor]:
    """Computes the directions of `Adagrad`, and updates its state in place.

    Args:
        params: The weights.
        grads: The gradients.
        sum: The sum of the squared gradients.
        weight_decay: L2 penalty.
        eps: Keeps the quotient finite.
        rate_decay: 1 + (step - 1) * lr_decay of each tensor.
    """
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_addcmul_(sum, grads, grads)
    scale = torch._foreach_sqrt(sum)
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(grads, scale)
    torch._foreach_div_(grads, rate_decay)
    return grads


class Adagrad(ShardedOptimizer):
    r"""Adagrad: scale each coordinate by the root of its summed squared gradients.

        g <- g + weight_decay * p
        s <- s + g^2                                     s starts at initial_accumulator_value
        direction = g / (sqrt(s) + eps) / (1 + (step - 1) * lr_decay)
        p <- p - lr * direction

    As `torch.optim.Adagrad`: eps is outside the root; the form sqrt(s + eps) of many textbooks puts it inside.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        lr_decay: The learning rate falls as 1 / (1 + (step - 1) * lr_decay), >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        initial_accumulator_value: Initial value of the sum, >= 0.
        eps: Keeps the quotient finite, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs.
        torch_options: Options of torch's that change nothing here.

    Reference: Duchi, Hazan, Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
    JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            kernel="adagrad",
            buffers=("sum",),
            squares=("sum",),
            scalars={"weight_decay": group["weight_decay"], "eps": group["eps"]},
            penalty="weight_decay",
            divisors={"rate_decay": lambda step: 1.0 + (step - 1.0) * group["lr_decay"]},
        )

    @compiled
    def directions(self, shards: Shards) -> list[Tensor]:
        return adagrad(shards.params, shards.grads, **shards.inputs)

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        buffer = super().init_slot(layout, group, name, param)
        local(buffer).fill_(group["initial_accumulator_value"])
        return buffer
