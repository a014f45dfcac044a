"""Stochastic gradient descent: plain, with Polyak's momentum, and with Nesterov's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.dispatch import kernel
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.optim.torch_options import TorchOptions


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffer: list[Tensor],
    *,
    steps: list[float],
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    rates: list[Tensor] | None = None,
) -> list[Tensor]:
    """The rule of `SGD`; `rates` multiply the decayed gradient before it meets the momentum (LARS)."""
    grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if rates is not None:
        torch._foreach_mul_(grads, rates)
    if momentum == 0.0:
        return grads
    torch._foreach_mul_(momentum_buffer, momentum)
    fresh = torch._foreach_mul(grads, [1.0 if step == 1.0 else 1.0 - dampening for step in steps])
    torch._foreach_add_(momentum_buffer, fresh)
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
        params: parameters, or param groups as dicts.
        lr: learning rate, >= 0; a number, or a tensor of one.
        momentum: in [0, 1); 0 keeps no state but the step.
        dampening: in [0, 1].
        weight_decay: L2 penalty added to the gradient, >= 0.
        nesterov: needs momentum > 0 and dampening 0.
        maximize: ascend instead of descend.
        trust_ratio: multiply each layer's direction by |p| / |direction| (not on paper for SGD; see LARS).
        trust_clip: bounds (low, high) of that ratio, or None.
        capturable: count the steps on the GPU, so that a CUDA graph may capture `step`; lr may be a tensor there then.
        torch_options: arguments of torch's that change nothing here (`fused`, `foreach`); others are refused.

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964,
        doi:10.1016/0041-5553(64)90137-5.
        Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2), 1983.
        Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
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
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                trust_ratio=trust_ratio,
                trust_clip=trust_clip,
                capturable=capturable,
            ),
            **torch_options,
        )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

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

    @kernel("sgd")
    def directions(self, shards: Shards) -> list[Tensor]:
        group = shards.group
        return sgd(
            shards.params,
            shards.grads,
            shards.buffers.get("momentum_buffer", []),
            steps=shards.steps,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            rates=shards.rates,
        )
