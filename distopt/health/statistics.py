"""Running statistics of a positive quantity, of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST = 0.1  # of the deviation of a logarithm: what varies by less than 10 % has no spike at 11 %


class RunningLog:
    """The exponential mean and variance of the logarithm of a quantity, by layer.

        w    <- max(1 / n, 1 - decay)                              n: observations so far
        mean <- mean + w (log x - mean)
        var  <- (1 - w) (var + w (log x - mean)^2)

    Norms vary by factors and not by differences, so their logarithms have a deviation. The first 1 / (1 - decay)
    observations have equal weights. Values that are 0 or not finite are left out.

    Args:
        layers: The number of layers.
        decay: Decay of the averages, in [0, 1).
        warmup: The number of observations of a layer before which it has no bound.
    """

    def __init__(self, layers: int, decay: float, warmup: int) -> None:
        self.decay, self.warmup = decay, warmup
        self.count, self.mean, self.variance = torch.zeros(3, layers, dtype=torch.float64).unbind()

    def bound(self, threshold: float) -> Tensor:
        """Returns exp(mean + threshold * deviation) of every layer; inf during the warmup."""
        deviation = self.variance.sqrt().clamp(min=_LEAST)
        return (self.mean + threshold * deviation).exp().where(self.count >= self.warmup, torch.inf)

    def add(self, values: Tensor, bound: Tensor) -> None:
        """Adds an observation of every layer, each at most its bound: a spike moves the mean no further than that."""
        seen = values.isfinite() & (values > 0.0)
        distance = torch.minimum(values, bound).log() - self.mean
        self.count = self.count + seen
        weight = (1.0 / self.count).clamp(min=1.0 - self.decay)
        mean = self.mean + weight * distance
        variance = (1.0 - weight) * (self.variance + weight * distance.square())
        self.mean, self.variance = mean.where(seen, self.mean), variance.where(seen, self.variance)

    def state(self) -> list[list[float]]:
        """Returns the statistics as lists of numbers, for JSON."""
        return [column.tolist() for column in (self.count, self.mean, self.variance)]

    def load(self, state: Any) -> None:
        """Takes what `state` has returned."""
        self.count, self.mean, self.variance = (torch.tensor(column, dtype=torch.float64) for column in state)
