"""LARS: SGD with momentum, and a trust ratio of each layer's weights to its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import options
from distopt.optim.sgd import SGD

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


class LARS(SGD):
    r"""LARS: momentum on gradients that are scaled, layer by layer, to the norm of the layer's weights.

        ratio = trust_coefficient * |p| / (|g| + weight_decay * |p|)      1 where |p| or |g| is 0
        v <- momentum * v + (1 - dampening) * ratio * (g + weight_decay * p)
        p <- p - lr * v              with nesterov: lr * (ratio * (g + weight_decay * p) + momentum * v)

    As Algorithm 1 of the paper, the ratio multiplies before the momentum; as in `SGD`, lr multiplies after it, which is
    the same while lr is constant. A layer is one parameter tensor, its norms are those of the full tensor, all in one
    all-reduce. timm multiplies in the same place; NVIDIA's LARC also clips the ratio so that it never exceeds 1 / lr.
    Groups with `trust_ratio=False` (biases and norms, see `distopt.param_groups`) take plain SGD steps.

    Args:
        params: As for `SGD`, like all but those below.
        trust_coefficient: The paper's eta, >= 0.
        trust_ratio: On by default.
        trust_clip: Bounds (low, high) of the ratio, trust_coefficient included, or None.

    Reference: You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, 2017, arXiv 1708.03888.
    """

    ratio_of = "gradient"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
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
        ShardedOptimizer.__init__(self, params, options(locals()), **torch_options)

    def trust_ratio(self, group: dict[str, Any], weight_norm: Tensor, other_norm: Tensor) -> Tensor:
        return group["trust_coefficient"] * weight_norm / (other_norm + group["weight_decay"] * weight_norm)
