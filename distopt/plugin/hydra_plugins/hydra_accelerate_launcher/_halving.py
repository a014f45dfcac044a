"""Successive halving: which jobs of a sweep are stopped before their end; it knows neither Hydra nor processes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

METRICS = "metrics.jsonl"


class Stopped(float):
    """The return value of a job that was stopped: its metric, for every sweeper a number.

    Attributes:
        stopped_at: The step of the metric.
    """

    stopped_at: int

    def __new__(cls, value: float, step: int) -> Stopped:
        found = super().__new__(cls, value)
        found.stopped_at = step
        return found

    def __getnewargs__(self) -> tuple[float, int]:  # type: ignore[override]
        return float(self), self.stopped_at


class Stop(NamedTuple):
    """Why a job is stopped: the step of its metric, its value, and its place among so many jobs at that rung."""

    step: int
    value: float
    place: int
    jobs: int

    def __str__(self) -> str:
        return f"stopped at step {self.step}: {self.value:.6g}, number {self.place} of {self.jobs}"


@dataclass
class Halving:
    """The asynchronous rule: a job goes on from a rung if its metric is among the best there so far.

    With k jobs that have reached the rung, this one included, it goes on if fewer than max(1, keep * k) of them are
    better. No job waits for another one, so the first to arrive always go on. A value that is not finite never does.

    Attributes:
        metric: The key of the value in the rows of `metrics.jsonl`, in the folder of a job.
        rungs: The steps at which jobs are compared; a job is at a rung with its first value at that step or later.
        keep: The share of jobs that go on from each rung.
        greater_is_better: Whether the largest value is the best.

    Reference: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, arXiv 1810.05934; in the
    variant that stops jobs instead of pausing them.
    """

    metric: str
    rungs: Sequence[int]
    keep: float = 0.5
    greater_is_better: bool = False
    _at: dict[int, dict[int, float]] = field(default_factory=dict)  # rung -> number of the job -> value
    _read: dict[int, int] = field(default_factory=dict)  # number of the job -> bytes that were read of its file

    def judge(self, number: int, folder: Path, since: float = 0.0) -> Stop | None:
        """Take in what a job has written, and return why it is to be stopped; None if it goes on.

        Args:
            number: The number of the job.
            folder: Its folder.
            since: The time of its start: what was last written before is of another run in the same folder.
        """
        stop = None
        for step, value in self._new(number, folder / METRICS, since):
            for rung in self.rungs:
                known = self._at.setdefault(rung, {})
                if step >= rung and number not in known:
                    known[number] = value
                    place = 1 + sum(self._cost(other) < self._cost(value) for other in known.values())
                    if not math.isfinite(value) or place > max(1.0, self.keep * len(known)):
                        stop = stop or Stop(step, value, place, len(known))
        return stop

    def missing(self, number: int) -> str:
        """Return what to say of a job that has ended without a value at the first rung: nothing if it has one."""
        if not self.rungs or number in self._at.get(self.rungs[0], ()):
            return ""
        return f" (no {self.metric} at step {self.rungs[0]} or later in {METRICS})"

    def _new(self, number: int, file: Path, since: float) -> list[tuple[int, float]]:
        """Return the steps and values of the complete rows, since the last call, that have the metric."""
        if all(number in self._at.get(rung, ()) for rung in self.rungs) or not file.is_file():
            return []
        status, start = file.stat(), self._read.get(number, 0)
        if status.st_mtime < since or status.st_size == start:
            return []
        with file.open("rb") as rows:
            rows.seek(start if start < status.st_size else 0)
            text, _, rest = rows.read().rpartition(b"\n")
            self._read[number] = rows.tell() - len(rest)
        return [row for line in text.splitlines() if (row := self._value(line))]

    def _value(self, line: bytes) -> tuple[int, float] | None:
        try:
            row = json.loads(line)
            return (int(row["step"]), float(row[self.metric])) if self.metric in row else None
        except (ValueError, TypeError, KeyError):  # a line of another program
            return None

    def _cost(self, value: float) -> float:
        return math.inf if not math.isfinite(value) else -value if self.greater_is_better else value
