"""RMSprop: scale each coordinate by a moving root mean square of its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import kernel
from distopt.kernels.shards import Shards
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.optim.torch_options import TorchOptions


def rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avg: list[Tensor],
    grad_avg: list[Tensor],
    momentum_buffer: list[Tensor],
    *,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
) -> list[Tensor]:
    """The rule of `RMSprop`; `grad_avg` is empty unless centered, `momentum_buffer` unless there is momentum."""
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_mul_(square_avg, alpha)
    torch._foreach_addcmul_(square_avg, grads, grads, 1.0 - alpha)
    if centered:
        torch._foreach_lerp_(grad_avg, grads, 1.0 - alpha)
        scale = torch._foreach_addcmul(square_avg, grad_avg, grad_avg, -1.0)
        torch._foreach_clamp_min_(scale, 0.0)  # a constant gradient has no variance, rounded below 0
        torch._foreach_sqrt_(scale)
    else:
        scale = torch._foreach_sqrt(square_avg)
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(grads, scale)
    if momentum == 0.0:
        return grads
    torch._foreach_mul_(momentum_buffer, momentum)
    torch._foreach_add_(momentum_buffer, grads)
    return [buffer.clone() for buffer in momentum_buffer]


class RMSprop(ShardedOptimizer):
    r"""RMSprop: scale each coordinate by a moving root mean square of its gradients.

        g <- g + weight_decay * p
        s <- alpha * s + (1 - alpha) * g^2
        a <- alpha * a + (1 - alpha) * g                 if centered
        g <- g / (sqrt(s - a^2) + eps)                   a = 0 unless centered
        direction = v <- momentum * v + g                g if momentum is 0
        p <- p - lr * direction

    As `torch.optim.RMSprop`: eps stands outside the root (textbooks, and TensorFlow, put it inside: sqrt(s + eps)), and
    s starts at 0 without bias correction, so that the first steps are up to 1 / sqrt(1 - alpha) times as long.

    Args:
        params: parameters, or param groups as dicts.
        lr: learning rate, >= 0; a number, or a tensor of one.
        alpha: decay of the moving average, in [0, 1).
        eps: keeps the quotient finite, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        momentum: in [0, 1), applied after the scaling.
        centered: divide by the standard deviation instead of the root mean square.
        maximize: ascend instead of descend.
        trust_ratio: multiply each layer's direction by |p| / |direction|.
        trust_clip: bounds (low, high) of that ratio, or None.
        capturable: count the steps on the GPU, so that a CUDA graph may capture `step`; lr may be a tensor there then.
        torch_options: arguments of torch's that change nothing here (`fused`, `foreach`); others are refused.

    References:
        Tieleman, Hinton, Lecture 6.5: RMSprop, COURSERA: Neural Networks for Machine Learning, 2012.
        Graves, Generating Sequences With Recurrent Neural Networks, 2013, arXiv 1308.0850 (centered).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
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
                alpha=alpha,
                eps=eps,
                weight_decay=weight_decay,
                momentum=momentum,
                centered=centered,
                maximize=maximize,
                trust_ratio=trust_ratio,
                trust_clip=trust_clip,
                capturable=capturable,
            ),
            **torch_options,
        )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] else ()
        return ("square_avg", *centered, *momentum)

    @kernel("rmsprop")
    def directions(self, shards: Shards) -> list[Tensor]:
        group = shards.group
        return rmsprop(
            shards.params,
            shards.grads,
            shards.buffers["square_avg"],
            shards.buffers.get("grad_avg", []),
            shards.buffers.get("momentum_buffer", []),
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            centered=group["centered"],
        )
