"""The factor of SAM's radius, a pure function of the step: when SAM starts, when it stops, and how rho moves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from distopt.bounds import integer, or_null
from distopt.bounds.optimizer import RHO_FACTORS


class RhoOptions(TypedDict, total=False):
    """The options of every member of the SAM family that say when it perturbs; see `SAM`."""

    start: int
    stop: int | None
    rho_schedule: Mapping[int, float] | None


@dataclass(frozen=True)
class RhoSchedule:
    """What rho is multiplied by at a step, counted from 0.

        factor(t) = 0                                    t < start, or t >= stop
                  = the line between the points around t, constant before the first and after the last, otherwise

    Args:
        start: The first step that perturbs, >= 0.
        stop: The first one that no longer does, > start; None for never.
        points: Factors >= 0 by step; None for 1.

    Raises:
        ValueError: For a value out of its bound.
    """

    start: int = 0
    stop: int | None = None
    points: Mapping[int, float] | None = None
    _sorted: tuple[tuple[int, float], ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        integer(0).check("start", self.start, "the first step that perturbs")
        or_null(integer(1)).check("stop", self.stop, "the first step that no longer perturbs")
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(
                f"stop must be > start, got start={self.start} and stop={self.stop}: leave SAM out, or swap"
            )
        RHO_FACTORS.check("rho_schedule", self.points)
        object.__setattr__(self, "_sorted", tuple(sorted((self.points or {0: 1.0}).items())))

    @property
    def constant(self) -> bool:
        """Whether the factor is 1 at every step."""
        return self.start == 0 and self.stop is None and self.points is None

    def factor(self, step: int) -> float:
        """Returns the factor of a step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        after = bisect_right(self._sorted, step, key=lambda point: point[0])
        (left, low), (right, high) = self._sorted[max(after - 1, 0)], self._sorted[min(after, len(self._sorted) - 1)]
        return low if right <= left or step <= left else low + (high - low) * (step - left) / (right - left)
