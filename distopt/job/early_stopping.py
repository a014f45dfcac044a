"""Early stopping: a run ends when a metric of its evaluations no longer improves."""

from __future__ import annotations

import math
from typing import Any

from distopt.bounds.evaluation import EARLY_STOPPING as BOUNDS
from distopt.job.protocols import Callback, RunState


class EarlyStopping(Callback):
    """Ends a run when a metric has not improved in some evaluations in a row.

        improved = metric < best - min_delta      (mode=min), or metric > best + min_delta (mode=max)

    The run then ends as after its last step, with a checkpoint of its last weights; `checkpoint.best` keeps the best
    ones. The best value and the count are in the checkpoint. A value that is not finite is no
    improvement, and an evaluation without the metric does not count.

    Args:
        metric: The metric of an evaluation, by its name in metrics.jsonl: `validation_loss`, `bits_per_byte`,
            `validation_token_accuracy`, `exact_match`, or one that a callback of your own has returned.
        patience: The number of evaluations without an improvement after which the run ends, >= 1.
        min_delta: The least change that counts, >= 0.
        mode: `min` for a metric that falls, `max` for one that rises.

    Raises:
        ValueError: For an argument out of its bound, and after the first evaluation if that has no such metric.

    Reference: Prechelt, Early Stopping - But When?, in Neural Networks: Tricks of the Trade, 1998.
    """

    def __init__(
        self, metric: str = "validation_loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        for name, value in dict(metric=metric, patience=patience, min_delta=min_delta, mode=mode).items():
            BOUNDS[name].check(f"early_stopping.{name}", value)
        self.metric, self.patience, self.min_delta, self.mode = metric, patience, min_delta, mode
        self._best: float | None = None
        self._best_step, self._without, self._seen = -1, 0, -1

    def after_evaluation(self, run: RunState) -> None:
        """Compares the metric with the best one; a step that was evaluated before does not count again."""
        if self.metric not in run.metrics:
            if self._seen >= 0:  # one that is not measured at every evaluation
                return
            there = ", ".join(run.metrics)
            raise ValueError(f"early_stopping.metric={self.metric}: an evaluation has {there}")
        value = run.metrics[self.metric]
        if run.step > self._seen:
            self._seen = run.step
            self._count(value, run.step)
        if self._without >= self.patience:
            best = f"the best was {self._best:.4g} at step {self._best_step}" if self._best is not None else "none was"
            margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
            run.stop(f"{self.metric} has not improved{margin} in {self._without} evaluations: {best}")

    def _count(self, value: float, step: int) -> None:
        sign = 1.0 if self.mode == "min" else -1.0
        finite = math.isfinite(value)
        if finite and (self._best is None or sign * value < sign * self._best - self.min_delta):
            self._best, self._best_step, self._without = value, step, 0
        else:
            self._without += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and the count, for JSON."""
        return {
            "metric": f"{self.metric} {self.mode}",
            "best": self._best,
            "best_step": self._best_step,
            "without": self._without,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned; of another metric nothing is known yet."""
        if state["metric"] == f"{self.metric} {self.mode}":
            self._best, self._best_step = state["best"], state["best_step"]
            self._without, self._seen = state["without"], state["seen"]
