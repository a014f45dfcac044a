"""Adam and AdamW: one rule, two places for the weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import kernel
from distopt.kernels.shards import Shards
from distopt.optim.base import ShardedOptimizer
from distopt.optim.torch_options import TORCH_OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.optim.torch_options import TorchOptions


def adam(
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    steps: list[float],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """m_hat / (sqrt(v_hat) + eps), after moving both moments by the gradient."""
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avg, grads, 1.0 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1.0 - beta2)
    scale = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(scale, [(1.0 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(scale, eps)
    update = torch._foreach_div(exp_avg, scale)
    torch._foreach_div_(update, [1.0 - beta1**step for step in steps])
    return list(update)


class Adam(ShardedOptimizer):
    r"""Adam: momentum divided by the root mean square of the gradient, both corrected for starting at zero.

        g <- g + weight_decay * p
        m <- beta1 * m + (1 - beta1) * g                 m_hat = m / (1 - beta1^step)
        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        direction = m_hat / (sqrt(v_hat) + eps)
        p <- p - lr * direction

    As the paper's Algorithm 1 and `torch.optim.Adam` without amsgrad; eps stands outside the root.

    Args:
        params: parameters, or param groups as dicts.
        lr: learning rate, >= 0; a number, or a tensor of one.
        betas: decay of the two moments, each in [0, 1).
        eps: keeps the quotient finite, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        maximize: ascend instead of descend.
        trust_ratio: multiply each layer's direction by |p| / |direction|.
        trust_clip: bounds (low, high) of that ratio, or None.
        capturable: count the steps on the GPU, so that a CUDA graph may capture `step`; lr may be a tensor there then.
        torch_options: arguments of torch's that change nothing here (`fused`, `foreach`); others are refused.

    Reference: Kingma, Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
                trust_ratio=trust_ratio,
                trust_clip=trust_clip,
                capturable=capturable,
            ),
            **torch_options,
        )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @kernel("adam")
    def directions(self, shards: Shards) -> list[Tensor]:
        group = shards.group
        decayed = torch._foreach_add(shards.grads, shards.params, alpha=group["weight_decay"])
        return self.moments(shards, list(decayed))

    def moments(self, shards: Shards, grads: list[Tensor]) -> list[Tensor]:
        """Adam's rule on these gradients, with the group's hyper-parameters."""
        group = shards.group
        return adam(
            grads,
            shards.buffers["exp_avg"],
            shards.buffers["exp_avg_sq"],
            steps=shards.steps,
            betas=group["betas"],
            eps=group["eps"],
        )


class AdamW(Adam):
    r"""AdamW: Adam whose weight decay does not pass through the moments.

        m <- beta1 * m + (1 - beta1) * g                 m_hat = m / (1 - beta1^step)
        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        direction = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
        p <- p - lr * direction

    As `torch.optim.AdamW`: the decay is multiplied by lr; in the paper it is multiplied by the schedule's factor alone.

    Args: as `Adam`, with weight_decay 0.01 by default.

    Reference: Loshchilov, Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101.
    """

    torch_options = TORCH_OPTIONS | {
        "decoupled_weight_decay": ((None, True), "weight decay is always decoupled here: use distopt.Adam")
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            trust_ratio=trust_ratio,
            trust_clip=trust_clip,
            capturable=capturable,
            **torch_options,
        )

    @kernel("adamw")
    def directions(self, shards: Shards) -> list[Tensor]:
        directions = self.moments(shards, shards.grads)
        torch._foreach_add_(directions, shards.params, alpha=shards.group["weight_decay"])
        return directions
