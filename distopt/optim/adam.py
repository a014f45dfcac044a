"""Adam and AdamW: one rule, with the weight decay in one of two places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import compiled
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    coupled: float,
    beta1: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    eps: float,
    decoupled: float,
    bias_correction1: list[float],
    bias_correction2_sqrt: list[float],
) -> list[Tensor]:
    """Computes m_hat / (sqrt(v_hat) + eps), and updates both moments in place.

    Args:
        params: The weights.
        grads: The gradients.
        exp_avg: The first moment m.
        exp_avg_sq: The second moment v.
        coupled: Weight decay that is added to the gradient (Adam).
        beta1: Decay of the first moment.
        one_minus_beta1: 1 - beta1.
        beta2: Decay of the second moment.
        one_minus_beta2: 1 - beta2.
        eps: Keeps the quotient finite.
        decoupled: Weight decay that is added to the direction (AdamW).
        bias_correction1: 1 - beta1^step of each tensor.
        bias_correction2_sqrt: sqrt(1 - beta2^step) of each tensor.
    """
    if coupled:
        grads = list(torch._foreach_add(grads, params, alpha=coupled))
    torch._foreach_lerp_(exp_avg, grads, one_minus_beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, one_minus_beta2)
    scale = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(scale, bias_correction2_sqrt)
    torch._foreach_add_(scale, eps)
    directions = torch._foreach_div(exp_avg, scale)
    torch._foreach_div_(directions, bias_correction1)
    if decoupled:
        torch._foreach_add_(directions, params, alpha=decoupled)
    return list(directions)


class Adam(ShardedOptimizer):
    r"""Adam: momentum divided by the root mean square of the gradient, both corrected for starting at zero.

        g <- g + weight_decay * p
        m <- beta1 * m + (1 - beta1) * g                 m_hat = m / (1 - beta1^step)
        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        direction = m_hat / (sqrt(v_hat) + eps)
        p <- p - lr * direction

    As the paper's Algorithm 1 and `torch.optim.Adam` without amsgrad; eps is outside the root.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        betas: Decay of the two moments, each in [0, 1).
        eps: Keeps the quotient finite, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Scale each layer's update to the norm of its weights.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs.
        torch_options: Options of torch's that change nothing here.

    Reference: Kingma, Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
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
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return self._rule(group, coupled=group["weight_decay"], decoupled=0.0, penalty="coupled")

    @compiled
    def directions(self, shards: Shards) -> list[Tensor]:
        return adam(shards.params, shards.grads, **shards.inputs)

    def _rule(
        self, group: dict[str, Any], coupled: float, decoupled: float, *, decay: str = "", penalty: str = ""
    ) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            kernel="adam",
            buffers=("exp_avg", "exp_avg_sq"),
            scalars={
                "coupled": coupled,
                "beta1": beta1,
                "one_minus_beta1": 1.0 - beta1,
                "beta2": beta2,
                "one_minus_beta2": 1.0 - beta2,
                "eps": group["eps"],
                "decoupled": decoupled,
            },
            divisors={
                "bias_correction1": lambda step: 1.0 - beta1**step,
                "bias_correction2_sqrt": lambda step: (1.0 - beta2**step) ** 0.5,
            },
            decay=decay,
            penalty=penalty,
            signed=("exp_avg",),
            squares=("exp_avg_sq",),
        )


class AdamW(Adam):
    r"""AdamW: Adam whose weight decay does not pass through the moments.

        m <- beta1 * m + (1 - beta1) * g                 m_hat = m / (1 - beta1^step)
        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        direction = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
        p <- p - lr * direction

    As `torch.optim.AdamW`: the decay is multiplied by lr; in the paper it is multiplied by the schedule's factor alone.

    Args:
        params: As for `Adam`, like all but the one below.
        weight_decay: Decay of the weights, >= 0.

    Reference: Loshchilov, Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101.
    """

    torch_options = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
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
        super().__init__(params, **options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return self._rule(group, coupled=0.0, decoupled=group["weight_decay"], decay="decoupled")
