"""LARS: SGD with momentum, each layer's rate set by its weights and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels import dispatch
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout
from distopt.optim.base import ShardedOptimizer
from distopt.optim.sgd import SGD

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.optim.torch_options import TorchOptions


class LARS(SGD):
    r"""LARS: momentum on gradients that are scaled, layer by layer, to the length of the layer's weights.

        ratio = trust_coefficient * |p| / (|g| + weight_decay * |p|)      1 where |p| or |g| is 0
        v <- momentum * v + (1 - dampening) * ratio * (g + weight_decay * p)
        p <- p - lr * v              with nesterov: lr * (ratio * (g + weight_decay * p) + momentum * v)

    As Algorithm 1 of the paper, the ratio multiplies before the momentum; as in `SGD`, lr multiplies after it, which is
    the same while lr is constant. A layer is one parameter tensor, its norms are those of the whole layer, all in one
    all-reduce. timm multiplies in the same place; NVIDIA's LARC also clips the ratio so that it never exceeds 1 / lr.
    Groups with `trust_ratio=False` (biases and norms, see `distopt.param_groups`) take plain SGD steps.

    Args: as `SGD`, and
        trust_coefficient: the paper's eta, >= 0.
        trust_clip: bounds (low, high) of the ratio, trust_coefficient included, or None.

    Reference: You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, 2017, arXiv 1708.03888.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-1,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        maximize: bool = False,
        trust_ratio: bool = True,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        ShardedOptimizer.__init__(
            self,
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                trust_coefficient=trust_coefficient,
                maximize=maximize,
                trust_ratio=trust_ratio,
                trust_clip=trust_clip,
                capturable=capturable,
            ),
            **torch_options,
        )

    def trusts(self, group: dict[str, Any]) -> bool:
        return False  # the ratio is in the rates, before the momentum

    def rate(self, layout: ShardLayout, work: list[Shards]) -> list[Shards]:
        trusted = [shards for shards in work if shards.group["trust_ratio"]]
        if not trusted:
            return work
        squares = dispatch.joined([dispatch.squares(shards) for shards in trusted])
        layers = [layer for shards in trusted for layer in shards.layers]
        weight, gradient = layout.total(layers, *squares).sqrt()
        return [self._rated(shards, weight, gradient) if shards.group["trust_ratio"] else shards for shards in work]

    def _rated(self, shards: Shards, weight: Tensor, gradient: Tensor) -> Shards:
        group = shards.group
        ratios = group["trust_coefficient"] * weight / (gradient + group["weight_decay"] * weight)
        ratios = torch.where((weight > 0) & (gradient > 0), ratios, 1.0)
        if group["trust_clip"] is not None:
            ratios = ratios.clamp(*group["trust_clip"])
        self._ratios.append((shards.layers, ratios))
        rates = {dtype: ratios.to(dtype).unbind() for dtype in {p.dtype for p in shards.params}}
        return replace(shards, rates=[rates[p.dtype][layer] for layer, p in zip(shards.layers, shards.params)])
