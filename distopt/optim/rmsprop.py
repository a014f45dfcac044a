"""RMSprop: scale each coordinate by a moving root mean square of its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import compiled
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avg: list[Tensor],
    grad_avg: list[Tensor] | None = None,
    momentum_buffer: list[Tensor] | None = None,
    *,
    weight_decay: float,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    momentum: float,
) -> list[Tensor]:
    """Computes the directions of `RMSprop`, and updates its state in place.

    Args:
        params: The weights.
        grads: The gradients.
        square_avg: The moving average of the squared gradients.
        grad_avg: The moving average of the gradients; None unless centered.
        momentum_buffer: The momentum; None without momentum.
        weight_decay: L2 penalty.
        alpha: Decay of the moving averages.
        one_minus_alpha: 1 - alpha.
        eps: Keeps the quotient finite.
        momentum: Decay of the momentum.
    """
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_mul_(square_avg, alpha)
    torch._foreach_addcmul_(square_avg, grads, grads, one_minus_alpha)
    if grad_avg is None:
        scale = torch._foreach_sqrt(square_avg)
    else:
        torch._foreach_lerp_(grad_avg, grads, one_minus_alpha)
        scale = torch._foreach_addcmul(square_avg, grad_avg, grad_avg, -1.0)
        torch._foreach_clamp_min_(scale, 0.0)  # a constant gradient has no variance, rounded below 0
        torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(grads, scale)
    if momentum_buffer is None:
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

    As `torch.optim.RMSprop`: eps is outside the root (textbooks, and TensorFlow, put it inside: sqrt(s + eps)), and
    s starts at 0 without bias correction, so that the first steps are up to 1 / sqrt(1 - alpha) times as long.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        alpha: Decay of the moving average, in [0, 1).
        eps: Keeps the quotient finite, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        momentum: In [0, 1), applied after the scaling.
        centered: Divide by the standard deviation instead of the root mean square.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs.
        torch_options: Options of torch's that change nothing here.

    References:
        Tieleman, Hinton, Lecture 6.5: RMSprop, COURSERA: Neural Networks for Machine Learning, 2012.
        Graves, Generating Sequences With Recurrent Neural Networks, 2013, arXiv 1308.0850 (centered).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
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
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        centered, momentum = bool(group["centered"]), bool(group["momentum"])
        return Rule(
            kernel="_".join(["rmsprop", *["centered"] * centered, *["momentum"] * momentum]),
            buffers=("square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * momentum),
            scalars={
                "weight_decay": group["weight_decay"],
                "alpha": group["alpha"],
                "one_minus_alpha": 1.0 - group["alpha"],
                "eps": group["eps"],
                "momentum": group["momentum"],
            },
            penalty="weight_decay",
            # A variance is the difference of two moments, in which the rounding of both would be larger than itself.
            signed=() if centered else ("momentum_buffer",) * momentum,
            squares=() if centered else ("square_avg",),
        )

    @compiled
    def directions(self, shards: Shards) -> list[Tensor]:
        return rmsprop(shards.params, shards.grads, **shards.inputs)
