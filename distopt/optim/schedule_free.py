"""Schedule-free SGD and AdamW: an average of all iterates in place of a decaying learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.averaging import ScheduleFree, averaged
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def normalized(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    beta2: float,
    one_minus_beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction2_sqrt: list[float],
) -> list[Tensor]:
    """Computes g / (sqrt(v_hat) + eps) + weight_decay y, and updates v in place; as Adam without its first moment."""
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, one_minus_beta2)
    scale = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(scale, bias_correction2_sqrt)
    torch._foreach_add_(scale, eps)
    updates = torch._foreach_div(grads, scale)
    torch._foreach_add_(updates, params, alpha=weight_decay)
    return list(updates)


class SGDScheduleFree(ScheduleFree):
    r"""Schedule-free SGD: the gradient at an interpolation y of an iterate z and of the average x of all iterates.

        g = gradient at y + weight_decay * y
        z <- z - lr * g
        x <- (1 - c) * x + c * z             c = w / (sum of w so far),  w = step^r * lr^weight_lr_power
        y <- (1 - momentum) * z + momentum * x

    The parameters are y while training, and x after `eval()`: the average is what is evaluated and saved, and replaces
    the decay of the learning rate. Use a warmup and a constant rate (`warmup_constant`). Rates that decay are allowed,
    since the weights w then decay too, but nothing is gained: x averages already.

    As equations 1 to 3 of the paper, with c of its Section 3.1 for r = 0, weight_lr_power = 2. The authors' code
    differs in one way: it weights by the largest lr so far instead of lr, which is the same until lr falls. Steps are
    counted
        for each parameter, so that one without a gradient keeps its x, y and z.

    Args:
        params: Parameters, or param groups as dicts.
        lr: Learning rate, >= 0; a number, or a tensor with one element on the CPU. Much larger than SGD's with
            momentum.
        momentum: The share of x in y, in (0, 1).
        weight_decay: L2 penalty, at y, >= 0.
        r: Power of the step in the weights w, >= 0.
        weight_lr_power: Power of lr in the weights w, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Must be False.
        trust_clip: Without effect.
        capturable: Must be False.
        torch_options: Options of torch's that change nothing here.

    Reference: Defazio et al., The Road Less Scheduled, NeurIPS 2024, arXiv 2405.15682.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def beta(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def rule(self, group: dict[str, Any]) -> Rule:
        return self.weighted(group, Rule(scalars={"weight_decay": group["weight_decay"]}))

    def directions(self, shards: Shards) -> list[Tensor]:
        inputs = dict(shards.inputs)
        updates = list(torch._foreach_add(shards.grads, shards.params, alpha=inputs.pop("weight_decay")))
        return averaged(shards.params, updates, **inputs)


class AdamWScheduleFree(ScheduleFree):
    r"""Schedule-free AdamW: as `SGDScheduleFree`, with Adam's second moment; the average replaces the first.

        v <- beta2 * v + (1 - beta2) * g^2               v_hat = v / (1 - beta2^step)
        u = g / (sqrt(v_hat) + eps) + weight_decay * y   g is the gradient at y
        z <- z - lr * u
        x <- (1 - c) * x + c * z             c = w / (sum of w so far),  w = step^r * lr^weight_lr_power
        y <- (1 - beta1) * z + beta1 * x

    The bias correction is Adam's. Algorithm 1 of the paper corrects lr instead, lr * sqrt(1 - beta2^step), also in the
    weights w and in the decay, and eps is then added to the root of v itself. For the rest, see `SGDScheduleFree`.

    Args:
        params: As for `SGDScheduleFree`, like all but those below.
        lr: Learning rate; one to ten times that of AdamW with a schedule.
        betas: The share of x in y, in (0, 1), and the decay of the second moment, in [0, 1).
        eps: Keeps the quotient finite, >= 0.
        weight_decay: Decay of the weights, at y, >= 0.

    Reference: Defazio et al., The Road Less Scheduled, NeurIPS 2024, arXiv 2405.15682.
    """

    torch_options = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def beta(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def rule(self, group: dict[str, Any]) -> Rule:
        beta2, names = group["betas"][1], ("exp_avg_sq",)
        scalars = {"beta2": beta2, "one_minus_beta2": 1.0 - beta2, "eps": group["eps"]}
        scalars["weight_decay"] = group["weight_decay"]
        corrections = {"bias_correction2_sqrt": lambda step: (1.0 - beta2**step) ** 0.5}
        return self.weighted(group, Rule(buffers=names, scalars=scalars, divisors=corrections, squares=names))

    def directions(self, shards: Shards) -> list[Tensor]:
        inputs = dict(shards.inputs)
        names = ("exp_avg_sq", "beta2", "one_minus_beta2", "eps", "weight_decay", "bias_correction2_sqrt")
        updates = normalized(shards.params, shards.grads, **{name: inputs.pop(name) for name in names})
        return averaged(shards.params, updates, **inputs)
