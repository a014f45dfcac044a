"""The mean of draws with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """The mean of independent draws.

    Attributes:
        value: The mean.
        error: Its standard error, sqrt(sample variance / draws); NaN for a single draw.
    """

    value: float
    error: float

    @classmethod
    def of(cls, draws: Sequence[float]) -> Mean:
        """Returns the mean of at least one draw."""
        value = sum(draws) / len(draws)
        if len(draws) < 2:
            return cls(value, math.nan)
        variance = sum((draw - value) ** 2 for draw in draws) / (len(draws) - 1)
        return cls(value, math.sqrt(variance / len(draws)))
