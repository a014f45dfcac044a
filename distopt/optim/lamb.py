"""LAMB: AdamW with each layer's update scaled to the norm of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distopt.optim.adam import AdamW
from distopt.optim.options import options

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


class LAMB(AdamW):
    r"""LAMB: AdamW's direction, scaled layer by layer to the norm of the layer's weights.

        m <- beta1 * m + (1 - beta1) * g                 m_hat = m / (1 - beta1^step)
        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        direction = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
        ratio = |p| / |direction|                        1 where either norm is 0; in `trust_clip` if that is given
        p <- p - lr * ratio * direction

    As Algorithm 2 of the paper's version 5, with phi the identity. A layer is one parameter tensor and its norms are
    those of the full tensor, however it is sharded: one all-reduce for all layers. Published variants differ: NVIDIA's
    (apex, and timm by default) leave the ratio out where weight_decay is 0 and clip the global gradient norm to 1
    inside; DeepSpeed's clamps the ratio to [0.01, 10] and has none under ZeRO; bitsandbytes' LAMB is Adam with the
    update clipped to the norm of the weights; version 3 of the paper has no bias correction. Use
    `distopt.param_groups` to leave out the ratio and the decay for biases and norms, as the paper's experiments do,
    `trust_clip=(0.01, 10.0)` for DeepSpeed's clamp, and `distopt.clip_grad_norm_` for NVIDIA's clipping.

    Args:
        params: As for `AdamW`, like all but those below.
        eps: 1e-6 by default.
        trust_ratio: On by default.

    Reference: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,
    arXiv 1904.00962.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        trust_ratio: bool = True,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, **options(locals()), **torch_options)
