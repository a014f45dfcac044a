"""Adagrad: scale each coordinate by the root of its summed squared gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import kernel
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout, local
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.optim.torch_options import TorchOptions


def adagrad(
    params: list[Tensor],
    grads: list[Tensor],
    sum: list[Tensor],
    *,
    steps: list[float],
    lr_decay: float,
    eps: float,
    weight_decay: float,
) -> list[Tensor]:
    """The rule of `Adagrad`."""
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_addcmul_(sum, grads, grads)
    scale = torch._foreach_sqrt(sum)
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(grads, scale)
    torch._foreach_div_(grads, [1.0 + (step - 1.0) * lr_decay for step in steps])
    return grads


class Adagrad(ShardedOptimizer):
    r"""Adagrad: scale each coordinate by the root of its summed squared gradients.

        g <- g + weight_decay * p
        s <- s + g^2                                     s starts at initial_accumulator_value
        direction = g / (sqrt(s) + eps) / (1 + (step - 1) * lr_decay)
        p <- p - lr * direction

    As `torch.optim.Adagrad`: eps stands outside the root; the form sqrt(s + eps) of many textbooks puts it inside.

    Args:
        params: parameters, or param groups as dicts.
        lr: learning rate, >= 0; a number, or a tensor of one.
        lr_decay: the rate falls as 1 / (1 + (step - 1) * lr_decay), >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        initial_accumulator_value: where the sum starts, >= 0.
        eps: keeps the quotient finite, >= 0.
        maximize: ascend instead of descend.
        trust_ratio: multiply each layer's direction by |p| / |direction|.
        trust_clip: bounds (low, high) of that ratio, or None.
        capturable: count the steps on the GPU, so that a CUDA graph may capture `step`; lr may be a tensor there then.
        torch_options: arguments of torch's that change nothing here (`fused`, `foreach`); others are refused.

    Reference: Duchi, Hazan, Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
    JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
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
        super().__init__(
            params,
            dict(
                lr=lr,
                lr_decay=lr_decay,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                eps=eps,
                maximize=maximize,
                trust_ratio=trust_ratio,
                trust_clip=trust_clip,
                capturable=capturable,
            ),
            **torch_options,
        )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        slot = super().init_slot(layout, group, name, param)
        local(slot).fill_(group["initial_accumulator_value"])
        return slot

    @kernel("adagrad")
    def directions(self, shards: Shards) -> list[Tensor]:
        group = shards.group
        return adagrad(
            shards.params,
            shards.grads,
            shards.buffers["sum"],
            steps=shards.steps,
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
