"""The learning-rate range test: a hundred steps at growing rates, after which everything is as before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distopt import collective
from distopt.bounds import integer, number
from distopt.layout import local
from distopt.optim.base import ShardedOptimizer
from distopt.rng import random_state, set_random_state

_SMOOTHING = 0.9  # decay rate of the average of the loss
_DIVERGED = 2.0  # the test ends where the smoothed loss is so many times the lowest


@dataclass(frozen=True)
class LRRange:
    """The curve of a range test.

    Attributes:
        rates: The learning rates, of the first param group, in the order of the steps.
        losses: The loss of each step, before its update.
        smoothed: The average of the losses up to each step, corrected for its start.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return self.rates[min(range(len(self.smoothed)), key=self.smoothed.__getitem__)]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, per factor of the rate, before it is lowest."""
        end = self.rates.index(self.lowest)
        falls = [self.smoothed[i + 1] - self.smoothed[max(i - 1, 0)] for i in range(end)]
        return self.rates[min(range(end), key=falls.__getitem__)] if falls else self.lowest

    @property
    def suggested(self) -> float:
        """A tenth of `lowest`: rates above it are unstable for longer than the test lasted."""
        return self.lowest / 10.0

    def __str__(self) -> str:
        return (
            f"learning-rate range test: {len(self.rates)} steps from {self.rates[0]:.3g} to {self.rates[-1]:.3g}; "
            f"the loss is lowest at {self.lowest:.3g}, falls fastest at {self.steepest:.3g}; try {self.suggested:.2g}"
        )


def lr_range_test(
    model: nn.Module,
    optimizer: ShardedOptimizer,
    train_step: Callable[[int], float],
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
) -> LRRange:
    """Trains for some steps at learning rates that grow exponentially, and undoes it bit for bit.

        lr(i) = low * (high / low)^(i / (steps - 1)),  i = 0 .. steps - 1

    It ends earlier where the smoothed loss is twice the lowest one, or not finite. The rates are those of the first
    group; the others keep their ratio to it. Weights, buffers, optimizer state, options and the state of the random
    number generators are afterwards the same bits as before; gradients are cleared. A collective: every rank calls it,
    and the loss of the first one decides when all of them end, so give the mean. Scratch memory: a copy of the local
    parameters and state.

    Args:
        model: The model, whose buffers are restored.
        optimizer: Its optimizer.
        train_step: Step number from 0 -> the loss. It clears the gradients, runs forward and backward on the batch of
            that number, and steps the optimizer. It has to take its batches by number, and not from an iterator, whose
            position nobody can put back.
        low: The first learning rate, > 0.
        high: The last one, > low.
        steps: The most steps, >= 3.

    Raises:
        ValueError: For a value out of bounds, an optimizer that is not distopt's, no step with a finite loss, and under
            DeepSpeed, whose weights are copies of its partitions.

    Reference: Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, arXiv 1506.01186.
    """
    number(0.0, above=True).check("low", low)
    number(low, above=True).check("high", high)
    integer(3).check("steps", steps)
    if not isinstance(optimizer, ShardedOptimizer):
        raise ValueError(
            f"a range test needs an optimizer of distopt, got {type(optimizer).__name__}: around one, as SAM is, give "
            "the one inside"
        )
    if optimizer.layout.flat:
        raise ValueError("a range test cannot put back DeepSpeed's copies of the weights: run it with engine=zero1")
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with _unchanged(model, optimizer), _rates(optimizer) as set_rate:
        for i in range(steps):
            rate = low * (high / low) ** (i / (steps - 1))
            set_rate(rate)
            mine = float(train_step(i))
            loss = collective.on_first(lambda mine=mine: mine)  # type: ignore[misc]
            average = _SMOOTHING * average + (1.0 - _SMOOTHING) * loss
            now = average / (1.0 - _SMOOTHING ** (i + 1))
            if not math.isfinite(now) or (smoothed and now > _DIVERGED * min(smoothed)):
                break
            rates.append(rate)
            losses.append(loss)
            smoothed.append(now)
    if not rates:
        raise ValueError(f"low={low!r}: the first loss is {loss}: the model does not compute, or low is too large")
    return LRRange(rates, losses, smoothed)


@contextlib.contextmanager
def _rates(optimizer: ShardedOptimizer) -> Iterator[Callable[[float], None]]:
    """Yields a function that sets the rate of the first group, and those of the others in proportion."""
    before = [group["lr"] for group in optimizer.param_groups]
    values = [float(lr) for lr in before]
    ratios = [value / values[0] if values[0] else 1.0 for value in values]

    def set_rate(rate: float) -> None:
        for group, ratio in zip(optimizer.param_groups, ratios):
            if isinstance(group["lr"], Tensor):  # in place, since a graph may read it
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio

    try:
        yield set_rate
    finally:
        for group, lr, value in zip(optimizer.param_groups, before, values):
            group["lr"] = lr.fill_(value) if isinstance(lr, Tensor) else lr


@contextlib.contextmanager
def _unchanged(model: nn.Module, optimizer: ShardedOptimizer) -> Iterator[None]:
    """Restores weights, buffers, state and random numbers at the end of the block, also after an error."""
    tensors = [local(t.detach()) for t in (*model.buffers(), *optimizer.layout.segments)]
    copies = [t.clone() for t in tensors]
    state = {p: dict(values) for p, values in optimizer.state.items()}
    values = [(local(t), local(t).clone()) for each in state.values() for t in each.values() if isinstance(t, Tensor)]
    numbers = random_state(*dict.fromkeys(t.device for t in tensors))
    try:
        yield
    finally:
        optimizer.zero_grad()
        assert optimizer.layout is not None  # waits for rows of other ranks that are on their way
        with torch.no_grad():
            for tensor, copy in [*zip(tensors, copies), *values]:
                tensor.copy_(copy)
        optimizer.state.clear()
        optimizer.state.update(state)
        set_random_state(numbers)
