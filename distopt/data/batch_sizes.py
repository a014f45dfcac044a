"""The number of sequences of each step, a pure function of the step: constant, or growing by a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distopt.bounds import Bound, integer, or_null

if TYPE_CHECKING:
    import numpy as np


def _are_sizes(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(integer(1).accepts(step) and integer(1).accepts(size) for step, size in value.items())


SCHEDULE = or_null(Bound("sequences >= 1 by step >= 1, such as {1000: 64, 3000: 128},", _are_sizes))


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of global batches: `first` sequences from step 0 on, and others from the steps that a schedule names.

    Args:
        first: The number of sequences of step 0, >= 1.
        schedule: Numbers of sequences by the first step that has them; None for `first` at every step.

    Raises:
        ValueError: For a number out of its bound.
    """

    first: int
    schedule: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        integer(1).check("batch_size", self.first)
        SCHEDULE.check("batch_schedule", self.schedule)

    @property
    def changes(self) -> list[tuple[int, int]]:
        """The steps at which the size changes, in order, each with the size from there on; step 0 first."""
        return [(0, self.first), *sorted((self.schedule or {}).items())]

    def size(self, step: int) -> int:
        """Returns the number of sequences of a step."""
        return next(size for begins, size in reversed(self.changes) if begins <= step)

    def before(self, step: int) -> int:
        """Returns the number of sequences of all steps before one."""
        ends = [begins for begins, _ in self.changes[1:]] + [step]
        return sum(max(min(end, step) - begins, 0) * size for (begins, size), end in zip(self.changes, ends))

    def steps(self, sequences: int) -> int:
        """Returns the least number of steps, at least one, that have so many sequences."""
        begins, size = max(change for change in self.changes if self.before(change[0]) < max(sequences, 1))
        return begins + -(-(max(sequences, 1) - self.before(begins)) // size)

    def positions(self, step: int) -> np.ndarray:
        """Returns the positions of the sequences of a step among those of all steps: int64, of shape [size]."""
        import numpy as np  # the configuration is read without it

        first = self.before(step)
        return np.arange(first, first + self.size(step))
