"""Learning-rate schedules: pure functions of the step, under torch's `LambdaLR`.

    lr_t = lr * factor(t)        t = 0 .. total_steps - 1 counts optimizer steps; every param group keeps its own lr

All of them warm up linearly, so that the first update already changes the weights (Transformers'
`get_*_schedule_with_warmup` give t / warmup_steps, whose first update has lr 0), and reach the peak once, with the last
warmup step:

    factor(0) = 1 / warmup_steps      factor(warmup_steps - 1) = 1      factor(total_steps - 1) = final_lr_ratio

The last line holds exactly for the schedules that have a `final_lr_ratio`, and they stay there afterwards (Transformers
reach it one step after the run). No warmup (0) is the same as a warmup of 1: step 0 is the peak.

Step a schedule once per optimizer step, on every rank, and keep it out of `accelerator.prepare`: a prepared schedule
advances once per process, so the learning rate would depend on the number of processes.

A param group that is added in mid-run follows the same curve from the schedule's next step on, with its own lr as its
peak.

A schedule's `state_dict` has its position and the groups' base learning rates, not its shape, which belongs to the
configuration: a run that is resumed with a larger `total_steps` follows the longer schedule from there.

Every constructor takes `(optimizer, warmup_steps, total_steps)` by keyword, and raises ValueError unless `warmup_steps`
is an integer in [0, total_steps) and `final_lr_ratio`, where it has one, is in [0, 1].
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distopt.bounds import RATIO
from distopt.bounds.schedule import check_phases

# A partial of a module-level function can be pickled, unlike a closure, and LambdaLR.state_dict saves nothing of it: of
# any other callable it saves the attributes, and restoring them would undo a change of the configuration.


class WarmupLR(LambdaLR):
    """A `LambdaLR` with one factor for all param groups, also for groups that are added after it was made."""

    def get_lr(self) -> list[float | Tensor]:
        self._follow()
        return super().get_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lr_lambdas = self.lr_lambdas[:1] * len(state_dict["lr_lambdas"])
        super().load_state_dict(state_dict)

    def _follow(self) -> None:
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            lr = group["lr"]
            self.base_lrs.append(group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr))
        self.lr_lambdas = self.lr_lambdas[:1] * len(self.base_lrs)


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_lr_ratio: float = 0.1) -> WarmupLR:
    """Makes a schedule: linear warmup, then half a cosine to `final_lr_ratio` at the last step; see `cosine_factor`."""
    _check(warmup_steps, total_steps, final_lr_ratio)
    factor = partial(cosine_factor, warmup_steps=warmup_steps, total_steps=total_steps, final_lr_ratio=final_lr_ratio)
    return WarmupLR(optimizer, factor)


def warmup_linear(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_lr_ratio: float = 0.0) -> WarmupLR:
    """Makes a schedule: linear warmup, then a line to `final_lr_ratio` at the last step; see `linear_factor`."""
    _check(warmup_steps, total_steps, final_lr_ratio)
    factor = partial(linear_factor, warmup_steps=warmup_steps, total_steps=total_steps, final_lr_ratio=final_lr_ratio)
    return WarmupLR(optimizer, factor)


def warmup_constant(optimizer: Optimizer, warmup_steps: int, total_steps: int | None = None) -> WarmupLR:
    """Makes a schedule: linear warmup, then the peak; `total_steps` only checks that the warmup ends in time."""
    _check(warmup_steps, total_steps)
    return WarmupLR(optimizer, partial(constant_factor, warmup_steps=warmup_steps))


def warmup_inverse_sqrt(optimizer: Optimizer, warmup_steps: int, total_steps: int | None = None) -> WarmupLR:
    """Makes a schedule: linear warmup, then 1 / sqrt(t); see `inverse_sqrt_factor`, and above for `total_steps`."""
    _check(warmup_steps, total_steps)
    return WarmupLR(optimizer, partial(inverse_sqrt_factor, warmup_steps=warmup_steps))


def warmup_stable_decay(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, decay_steps: int, final_lr_ratio: float = 0.0
) -> WarmupLR:
    """Makes a schedule: linear warmup, the peak, then a straight line over the last `decay_steps` steps.

    See `stable_decay_factor`.

    Raises:
        ValueError: Also unless `decay_steps` is in [1, total_steps - max(warmup_steps, 1)].
    """
    _check(warmup_steps, total_steps, final_lr_ratio, decay_steps)
    factor = partial(
        stable_decay_factor,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        decay_steps=decay_steps,
        final_lr_ratio=final_lr_ratio,
    )
    return WarmupLR(optimizer, factor)


def constant_factor(step: int, warmup_steps: int) -> float:
    """Returns the factor of the linear warmup that all schedules share.

    factor = min(1, (t + 1) / warmup_steps)
    """
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine_factor(step: int, warmup_steps: int, total_steps: int, final_lr_ratio: float) -> float:
    """Returns the factor of cosine annealing without restarts, after a linear warmup.

        factor = final + (1 - final) * (1 + cos(pi * s)) / 2        s: from 0 at the peak to 1 at the last step

    A bare cos(pi * t / T), as some summaries give it, is negative from t = T / 2 on and would ascend the loss; the
    published schedule is the half-cosine above, never below `final_lr_ratio`.

    Reference: I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, equation 5,
    https://arxiv.org/abs/1608.03983
    """
    fall = 0.5 * (1.0 + math.cos(math.pi * _progress(step, _peak(warmup_steps), total_steps)))
    return constant_factor(step, warmup_steps) * (final_lr_ratio + (1.0 - final_lr_ratio) * fall)


def linear_factor(step: int, warmup_steps: int, total_steps: int, final_lr_ratio: float) -> float:
    """Returns the factor of a linear decay after a linear warmup: down to 0, the schedule of BERT and of LAMB.

        factor = final + (1 - final) * (1 - s)        s: from 0 at the peak to 1 at the last step

    Reference: J. Devlin, M.-W. Chang, K. Lee, K. Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
    Language Understanding", 2018, appendix A.2, https://arxiv.org/abs/1810.04805
    """
    fall = 1.0 - _progress(step, _peak(warmup_steps), total_steps)
    return constant_factor(step, warmup_steps) * (final_lr_ratio + (1.0 - final_lr_ratio) * fall)


def inverse_sqrt_factor(step: int, warmup_steps: int) -> float:
    """Returns the factor of the Transformer's schedule, scaled to a peak of 1.

        factor = min(n / w, sqrt(w / n))        n = t + 1, w = max(1, warmup_steps)

    The paper's learning rate is this times (model dimension * w)^-0.5, which is left to `lr` here.

    Reference: A. Vaswani et al., "Attention Is All You Need", 2017, equation 3, https://arxiv.org/abs/1706.03762
    """
    warmup = max(1, warmup_steps)
    return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def stable_decay_factor(
    step: int, warmup_steps: int, total_steps: int, decay_steps: int, final_lr_ratio: float
) -> float:
    """Returns the factor of warmup-stable-decay (WSD): the peak, then a linear decay over the last `decay_steps` steps.

        factor = final + (1 - final) * (1 - s)        s = k / decay_steps at the k-th of the last steps, 0 before

    The paper leaves the shape of the fall open and uses an exponential; this one is a straight line, which ends at
    `final_lr_ratio`.

    Reference: S. Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies", 2024, https://arxiv.org/abs/2404.06395
    """
    fall = 1.0 - _progress(step, total_steps - 1 - decay_steps, total_steps)
    return constant_factor(step, warmup_steps) * (final_lr_ratio + (1.0 - final_lr_ratio) * fall)


def _peak(warmup_steps: int) -> int:
    """Returns the step whose factor is 1, the last of the warmup."""
    return max(warmup_steps - 1, 0)


def _progress(step: int, start: int, total_steps: int) -> float:
    """Returns 0 up to step `start`, rising to 1 at the last step and after; a run of one step stays at its peak."""
    return min(1.0, max(0, step - start) / max(1, total_steps - 1 - start))


def _check(
    warmup_steps: int, total_steps: int | None, final_lr_ratio: float = 0.0, decay_steps: int | None = None
) -> None:
    check_phases(warmup_steps, total_steps, decay_steps)
    RATIO.check("final_lr_ratio", final_lr_ratio, "it is a fraction of the peak, not a learning rate")
