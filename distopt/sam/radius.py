"""The radius of SAM's perturbation: that of each param group, at each step."""

from __future__ import annotations

from typing import Any

import torch

from distopt.bounds import integer
from distopt.optim.validate import bounded, positive
from distopt.sam.rho_schedule import RhoSchedule
from distopt.sam.wrapper import OptimizerWrapper


class RadiusOptimizer(OptimizerWrapper):
    """A wrapper that knows at which steps weights are perturbed, and how far.

    Steps are counted in the param groups (`sam_steps`), where checkpoints find them, if it matters which step it is.

    Args:
        optimizer: The optimizer inside. A param group may have its own radius, `sam_rho`, >= 0.
        rho: The radius of the other groups, > 0.
        interval: Perturb at every so many steps, >= 1.
        schedule: The factor of every radius by step.

    Attributes:
        step_number: The step of the schedule, where a loop counts it; None counts those of this wrapper.

    Raises:
        ValueError: For a value out of its bound.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float, interval: int, schedule: RhoSchedule) -> None:
        super().__init__(optimizer)
        self.schedule = schedule
        self.step_number: int | None = None
        self.rho = positive("rho", rho, "leave SAM out for rho = 0")
        for group in optimizer.param_groups:
            self.radius(group)
        integer(1).check("interval", interval, "1 perturbs at every step")
        self.interval = interval

    @property
    def ascends(self) -> bool:
        """Whether the current step perturbs the weights and needs a gradient there."""
        return self._steps() % self.interval == 0 and self._factor() > 0.0

    def radius(self, group: dict[str, Any]) -> float:
        """Returns the radius of a param group: its `sam_rho`, or `rho`.

        Raises:
            ValueError: If `sam_rho` is not a number >= 0, or if the group has a `rho` that is meant for SAM.
        """
        if "rho" in group and "rho" not in self.optimizer.defaults:
            raise ValueError(
                f"a param group has rho={group['rho']!r}, which is no option of {type(self.optimizer).__name__}: "
                "SAM's radius for a group is called sam_rho"
            )
        return bounded("sam_rho of a param group", group["sam_rho"], 0.0) if "sam_rho" in group else self.rho

    def radius_now(self, group: dict[str, Any]) -> float:
        """Returns the radius of a param group in the current step: `radius` times the factor of the schedule."""
        return self.radius(group) * self._factor()

    @property
    def _counts(self) -> bool:
        """Whether steps are counted in the param groups."""
        return self.interval > 1 or not self.schedule.constant

    def _factor(self) -> float:
        """Returns the factor of the radius in the current step."""
        if self.schedule.constant:
            return 1.0
        return self.schedule.factor(self._steps() if self.step_number is None else self.step_number)

    def _steps(self) -> int:
        """Returns the number of steps so far, by the param groups: checkpoints may drop groups without parameters."""
        # A group that was added later has no count.
        return max((group.get("sam_steps", 0) for group in self.param_groups), default=0)
