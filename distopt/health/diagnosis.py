"""The diagnosis of each step: what watches the norms of all layers, with its running statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.health.alarms import Alarm, Dead, Depth, Quantity
from distopt.health.depth import find_series
from distopt.health.statistics import RunningLog


class Limits(NamedTuple):
    """What is an alarm; the arguments of `distopt.health.Monitor` of the same names."""

    threshold: float
    decay: float
    warmup: int
    depth_factor: float
    dead_steps: int


class Diagnosis:
    """The statistics and the alarms of one set of layers.

    Args:
        names: The names of the layers.
        shapes: Their full shapes.
        limits: What is an alarm.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], limits: Limits) -> None:
        self.names = list(names)
        gradient, update = (RunningLog(len(names), limits.decay, limits.warmup) for _ in range(2))
        self.gradient = Quantity("spike of the gradient", gradient, limits.threshold)
        self.update = Quantity("spike of the update", update, limits.threshold)
        self.dead = Dead(len(names), limits.dead_steps)
        self.depth = Depth(find_series(names, shapes), limits.depth_factor)

    def of_gradient(self, step: int, norms: Tensor) -> tuple[list[Alarm], dict[int, float], list[Alarm]]:
        """Returns the alarms that call for an action, with the factors that would clip, and the other alarms."""
        acute, factors = self.gradient.check(step, self.names, norms)
        slow = self.dead.check(step, self.names, norms) + self.depth.check(step, self.gradient.statistics)
        return acute, factors, slow

    def of_update(self, step: int, norms: Tensor) -> tuple[list[Alarm], dict[int, float]]:
        """Returns the alarms, and the factors that would clip."""
        return self.update.check(step, self.names, norms)

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics, for JSON."""
        return {
            "names": self.names,
            "gradient": self.gradient.statistics.state(),
            "update": self.update.statistics.state(),
            "dead": self.dead.count.tolist(),
            "depth": dict(self.depth.kinds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned, unless it is of other layers, whose statistics start anew."""
        if list(state["names"]) != self.names:
            return
        self.gradient.statistics.load(state["gradient"])
        self.update.statistics.load(state["update"])
        self.dead.count = torch.tensor(state["dead"], dtype=torch.int64)
        self.depth.kinds = dict(state["depth"])
