"""The average of a job's weights: `average=ema`, `evaluation.average`."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from distopt.job.config import check_kind
from distopt.optim.averaged import average_of
from distopt.optim.weight_average import WeightAverage


def check_average(optimizer: Optimizer, make: Callable[..., WeightAverage] | None, evaluated: bool | None) -> None:
    """Refuses an average of an optimizer that has none, and an evaluation of one that is not there.

    Args:
        optimizer: The optimizer, of a few weights.
        make: Makes the average; None for none.
        evaluated: `evaluation.average`.

    Raises:
        ValueError: With the key at fault and the remedy.
    """
    if make:
        check_kind(make(optimizer), "average", WeightAverage)
    if evaluated and average_of(optimizer) is None:
        raise ValueError(
            "evaluation.average=true, and the run has no average of its weights: give average=ema, average=lawa or a "
            "schedule-free optimizer, or null"
        )
