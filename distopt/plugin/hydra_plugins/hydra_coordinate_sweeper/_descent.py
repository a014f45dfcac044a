"""Coordinate descent over a few settings of one row, and the rungs that follow; it knows nothing of Hydra."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[Any, ...]  # the scale of the learning rate, then the value of each ladder


@dataclass
class Descent:
    """Coordinate descent from a start: along one coordinate after the other, while the loss falls.

    The first coordinate, the scale of the learning rate, has no bounds: its neighbours are `factor` times larger and
    smaller. The others have a ladder of values. When no coordinate improves any more, `factor` becomes its square root.
    With a factor of 1 the scale stays as it is.

    Attributes:
        ladders: The values of each further coordinate, in order.
        start: The first point.
        factor: The factor between scales, >= 1.
        losses: The losses so far, inf where a run diverged.
    """

    ladders: Sequence[Sequence[Any]]
    start: Point
    factor: float
    losses: dict[Point, float] = field(default_factory=dict)
    _along: int = 0
    _idle: int = 0  # coordinates in a row along which there was nothing left to measure

    @property
    def best(self) -> Point:
        """The point with the smallest loss, the earliest of equal ones."""
        return min(self.losses, key=lambda point: self.losses[point])

    def ask(self) -> list[Point]:
        """Return the points to measure next: the start, or both neighbours of the best one along a coordinate.

        None if nothing is left: steps of the learning rate below 2 % do not differ by more than noise.
        """
        if not self.losses:
            return [self.start]
        while True:
            points = [point for point in self._neighbours(self._along) if point not in self.losses]
            if points:
                self._idle = 0
                return points
            self._along, self._idle = (self._along + 1) % (1 + len(self.ladders)), self._idle + 1
            if self._idle > len(self.ladders):
                if self.factor <= 1.02:
                    return []
                self.factor, self._along, self._idle = math.sqrt(self.factor), 0, 0

    def _neighbours(self, along: int) -> list[Point]:
        best = self.best
        if along == 0:
            values = [float(f"{best[0] / self.factor:.4g}"), float(f"{best[0] * self.factor:.4g}")]
        else:
            ladder = self.ladders[along - 1]
            at = ladder.index(best[along])
            values = list(ladder[max(0, at - 1) : at]) + list(ladder[at + 1 : at + 2])
        return [(*best[:along], value, *best[along + 1 :]) for value in values]


@dataclass(frozen=True)
class Trial:
    """One run: a point, its number of steps, and its seed (None: that of the search)."""

    point: Point
    steps: int
    seed: int | None = None


Losses = Mapping[Trial, float]


def kept(trials: int, rungs: Sequence[int]) -> list[int]:
    """Return the number of runs of each rung: fewer by the factor by which the runs are longer, at least one."""
    return [max(1, round(trials * rungs[0] / steps)) for steps in rungs]


def tune(descent: Descent, trials: int, rungs: Sequence[int], seeds: Sequence[int]) -> Generator[list[Trial], Losses]:
    """Yield lists of runs that do not depend on each other, and receive their losses.

    Every rung is a complete schedule of its own, so that only losses at the end of a decay are compared.

    Args:
        descent: Where the search starts; holds the losses of the first rung afterwards.
        trials: The number of runs of the first rung.
        rungs: The steps of a run of each rung, increasing.
        seeds: The seeds of the best point of the last rung.
    """
    while len(descent.losses) < trials:
        asked = [Trial(point, rungs[0]) for point in descent.ask()[: trials - len(descent.losses)]]
        if not asked:
            break
        losses = yield asked
        descent.losses.update({trial.point: losses[trial] for trial in asked})
    ranking = descent.losses
    for steps, count in list(zip(rungs, kept(trials, rungs)))[1:]:
        best = sorted(ranking, key=lambda point: ranking[point])[:count]
        losses = yield [Trial(point, steps) for point in best]
        ranking = {point: losses[Trial(point, steps)] for point in best}
    chosen = min(ranking, key=lambda point: ranking[point])
    yield [Trial(chosen, rungs[-1], seed) for seed in seeds]
