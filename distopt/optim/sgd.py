"""Stochastic gradient descent: plain, with Polyak's momentum, and with Nesterov's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import compiled
from distopt.kernels.rules import OfStep, Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffer: list[Tensor] | None = None,
    *,
    weight_decay: float,
    momentum: float = 0.0,
    one_minus_dampening: list[float] | None = None,
    ratio: list[Tensor] | None = None,
    nesterov: bool = False,
) -> list[Tensor]:
    """Computes the directions of `SGD`, and updates its momentum in place.

    Args:
        params: The weights.
        grads: The gradients.
        momentum_buffer: The momentum; None or an empty list without momentum.
        weight_decay: L2 penalty.
        momentum: Decay of the momentum.
        one_minus_dampening: The share of each gradient in the momentum.
        ratio: Trust ratios, 0-D tensors, that multiply the decayed gradients before the momentum (LARS).
        nesterov: Use Nesterov's momentum.
    """
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if ratio is not None:
        torch._foreach_mul_(grads, ratio)
    if momentum_buffer is None or one_minus_dampening is None:
        return grads
    torch._foreach_mul_(momentum_buffer, momentum)
    torch._foreach_add_(momentum_buffer, torch._foreach_mul(grads, one_minus_dampening))
    if nesterov:
        torch._foreach_add_(grads, momentum_buffer, alpha=momentum)
        return grads
    return [buffer.clone() for buffer in momentum_buffer]


class SGD(ShardedOptimizer):
    r"""Stochastic gradient descent, optionally with momentum.

        g <- g + weight_decay * p
        v <- momentum * v + (1 - dampening) * g            v = g at the first step with momentum
        direction = g + momentum * v   if nesterov,   else v   (g if momentum is 0)
        p <- p - lr * direction

    As `torch.optim.SGD`. Polyak's momentum is `momentum=0.9`; the averaged form v = b v + (1 - b) g is `momentum=b,
    dampening=b`. It differs from the textbook in three ways, as torch does: lr multiplies v instead of entering it
    (the same while lr is constant); v starts at the first gradient, so that the averaged form needs no bias correction;
    and Nesterov's form is shifted: p here is the look-ahead point theta + mu v of

        v <- mu v - lr grad(theta + mu v),   theta <- theta + v

    so that the gradient is taken where the parameters are. The sequence of look-ahead points is the same.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        momentum: In [0, 1); 0 keeps no state but the step.
        dampening: In [0, 1].
        weight_decay: L2 penalty added to the gradient, >= 0.
        nesterov: Use Nesterov's momentum; needs momentum > 0 and dampening 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Not published for SGD; see `LARS`.
        trust_clip: Bounds of the trust ratio.
        capturable: For CUDA graphs.
        torch_options: Options of torch's that change nothing here.

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964,
        doi:10.1016/0041-5553(64)90137-5.
        Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2), 1983.
        Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        scalars, scales = {"weight_decay": group["weight_decay"]}, {"ratio": lambda step: 1.0}
        if not group["momentum"]:
            return Rule("sgd", (), scalars, scales, penalty="weight_decay")
        dampening = group["dampening"]
        dampened: dict[str, OfStep] = {"one_minus_dampening": lambda step: 1.0 - dampening * (step != 1.0)}
        kernel = "nesterov" if group["nesterov"] else "momentum"
        scalars = scalars | {"momentum": group["momentum"]}
        names = ("momentum_buffer",)
        return Rule(kernel, names, scalars, scales | dampened, penalty="weight_decay", signed=names)

    @compiled
    def directions(self, shards: Shards) -> list[Tensor]:
        return sgd(shards.params, shards.grads, nesterov=shards.group["nesterov"], **shards.inputs)

    def required(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()  # torch's counts no steps, and its momentum begins at the first gradient

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        # Momentum may be switched on in mid-run: `step` counts from there, since the first gradient is not dampened.
        self.state[param]["step"] = torch.zeros_like(self.state[param]["step"])
        return super().init_slot(layout, group, name, param)

    def check(self, group: dict[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] == 0.0 or group["dampening"] != 0.0):
            raise ValueError(
                "nesterov needs momentum > 0 and dampening 0, "
                f"got momentum={group['momentum']!r}, dampening={group['dampening']!r}"
            )
