"""Alarms: what the norms of a step say of the health of a run, with the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.health.depth import Series, Trend, trend
from distopt.health.statistics import RunningLog


class Alarm(NamedTuple):
    """One finding.

    Attributes:
        step: The number of the step, from 1.
        kind: `spike of the gradient`, `spike of the update`, `vanishing`, `exploding`, `dead` or `non-finite`.
        layer: The name of the parameter, the worst if several are concerned; of a series, for vanishing and exploding.
        others: The number of further parameters.
        value: The value: a norm, a factor per layer, or a number of steps.
        bound: What it should have been below, or above for vanishing.
    """

    step: int
    kind: str
    layer: str
    others: int
    value: float
    bound: float

    def __str__(self) -> str:
        more = f" and {self.others} others" if self.others else ""
        what = {
            "vanishing": "the gradient's norm is multiplied by {0:.3g} per layer on its way back, {1:.3g} in all",
            "exploding": "the gradient's norm is multiplied by {0:.3g} per layer on its way back, {1:.3g} in all",
            "dead": "no gradient for {0:.0f} steps",
            "non-finite": "the norm is {0}",
        }.get(self.kind, "norm {0:.4g}, its statistics allow {1:.4g}")
        return f"step {self.step}: {self.kind}: {self.layer}{more}: {what.format(self.value, self.bound)}"


class Quantity:
    """One watched norm, the gradient's or the update's, against the running statistics of each layer.

    Args:
        kind: The kind of its alarms.
        statistics: Its running statistics.
        threshold: The number of deviations above the mean that are a spike.
    """

    def __init__(self, kind: str, statistics: RunningLog, threshold: float) -> None:
        self.kind, self.statistics, self.threshold = kind, statistics, threshold

    def check(self, step: int, names: Sequence[str], values: Tensor) -> tuple[list[Alarm], dict[int, float]]:
        """Looks for spikes and for values that are not finite, and adds the values to the statistics.

        Returns:
            The alarms, at most one of each kind, and for each layer with a spike bound / value.
        """
        bound = self.statistics.bound(self.threshold)
        self.statistics.add(values, bound)
        excess = (values / bound).where(values.isfinite(), 0.0)
        alarms = []
        if bad := values.isinf().logical_or(values.isnan()).nonzero().flatten().tolist():
            alarms.append(Alarm(step, "non-finite", names[bad[0]], len(bad) - 1, float(values[bad[0]]), torch.inf))
        spikes = (excess > 1.0).nonzero().flatten().tolist()
        if spikes:
            worst = int(excess.argmax())
            numbers = float(values[worst]), float(bound[worst])
            alarms.append(Alarm(step, self.kind, names[worst], len(spikes) - 1, *numbers))
        return alarms, {layer: 1.0 / float(excess[layer]) for layer in spikes}


class Dead:
    """Layers whose gradient is 0 in many steps in a row; each gives an alarm once, until it has a gradient again."""

    def __init__(self, layers: int, steps: int) -> None:
        self.steps, self.count = steps, torch.zeros(layers, dtype=torch.int64)

    def check(self, step: int, names: Sequence[str], gradient: Tensor) -> list[Alarm]:
        """Counts a step."""
        self.count = (self.count + 1).where(gradient == 0.0, 0)
        dead = (self.count == self.steps).nonzero().flatten().tolist()
        return [Alarm(step, "dead", names[dead[0]], len(dead) - 1, self.steps, self.steps)] if dead else []


class Depth:
    """Trends of the gradient over depth, of the running means of the norms; an alarm when one begins.

    Args:
        series: The series of the model.
        total: The factor over the whole depth, > 1, that is an alarm, and its reciprocal.
        fit: The share of the variance that the trend has to explain.
    """

    def __init__(self, series: Sequence[Series], total: float, fit: float = 0.5) -> None:
        self.series, self.total, self.fit = list(series), total, fit
        self.kinds: dict[str, str] = {}  # of the series that have a trend now

    def trends(self, statistics: RunningLog) -> list[Trend]:
        """Returns the trend of every series that has one."""
        logarithms = statistics.mean.where(statistics.count > 0, torch.nan).tolist()
        return [found for series in self.series if (found := trend(series, logarithms))]

    def check(self, step: int, statistics: RunningLog) -> list[Alarm]:
        """Returns the alarms of series whose trend has begun at this step."""
        alarms = []
        for found in self.trends(statistics):
            vanishes, explodes = found.total <= 1.0 / self.total, found.total >= self.total
            kind = "" if found.fit < self.fit else "vanishing" if vanishes else "exploding" if explodes else ""
            if kind and self.kinds.get(found.series.name) != kind:
                others = len(found.series.layers) - 1
                alarms.append(Alarm(step, kind, found.series.name, others, found.factor, found.total))
            self.kinds[found.series.name] = kind
        return alarms
