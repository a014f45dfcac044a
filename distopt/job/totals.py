"""The tokens of a run: how many the model has read and learnt to predict by each step."""

from __future__ import annotations

from array import array
from typing import Any

from distopt.data.accuracy import Counts


class Totals:
    """The number of tokens, without padding, and of targets, of all steps so far over all processes.

    It remembers those of every step since the start of this process, 16 bytes each, for a run that is rolled back.

    Args:
        step: The number of steps done before.
        saved: What a checkpoint of that step keeps; empty at step 0.
    """

    def __init__(self, step: int = 0, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self._first = step
        self._tokens, self._targets = (array("q", [saved.get(name, 0)]) for name in ("tokens", "target_tokens"))
        self.last = Counts(0, 0)

    def add(self, counts: Counts) -> None:
        """Adds those of a step."""
        self.last = counts
        self._tokens.append(self._tokens[-1] + counts.tokens)
        self._targets.append(self._targets[-1] + counts.targets)

    def go_back(self, step: int) -> None:
        """Forgets the steps after one."""
        del self._tokens[step - self._first + 1 :], self._targets[step - self._first + 1 :]

    def row(self) -> dict[str, int]:
        """Returns both numbers, by their names in metrics.jsonl and in a checkpoint's manifest."""
        return {"tokens": self._tokens[-1], "target_tokens": self._targets[-1]}
