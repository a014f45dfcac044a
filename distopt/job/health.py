"""A run's health: norms of layers and alarms in its folder, its log and its trackers, and rollbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from distopt.checkpoint import load_checkpoint
from distopt.health import Alarm, Monitor, StepNorms
from distopt.job.resume import hyperparameters, keep_configured

if TYPE_CHECKING:
    from distopt.job.job import Job


class Health:
    """Watches a job by a `distopt.health.Monitor`.

    Args:
        job: The job.
        make: Makes the monitor.
        saved: The statistics in the checkpoint that the job resumes from, if there are any.

    Attributes:
        monitor: The monitor.
    """

    def __init__(self, job: Job, make: Callable[..., Monitor], saved: Mapping[str, Any] | None) -> None:
        self._job = job
        self.monitor = make(
            job.stepper,
            job.engine.unwrap(job.model),
            others=[job.schedule],
            reload=self._reload,
            on_alarm=self._tell,
        )
        self.monitor.step = job.step
        if saved is not None:
            self.monitor.load_state_dict(saved)

    def rolled_back(self) -> int | None:
        """Returns the number of steps to which the last step has put the run back, once; None for none."""
        to, self.monitor.rolled_back = self.monitor.rolled_back, None
        return to

    def write(self) -> None:
        """Writes the norms of the last complete step to layers.jsonl and, as histograms, to the trackers."""
        job, last = self._job, self.monitor.last
        if last is None:
            return
        values = by_layer(self.monitor.names, last)
        job.monitor.write_layers(values, last.step)
        if job.accelerator.is_main_process:
            job.trackers.log_histograms({key: [*layers.values()] for key, layers in values.items()}, last.step)

    def _tell(self, alarm: Alarm) -> None:
        self._job.monitor.say(f"health: {alarm}")
        self._job.monitor.write_alarm(alarm._asdict())

    def _reload(self) -> int | None:
        """Loads the last checkpoint, but for the hyper-parameters, which stay those of the configuration."""
        job = self._job
        if job.checkpoint is None:
            return None
        job.checkpointer.wait()
        configured = hyperparameters(job.optimizer)
        extra = load_checkpoint(job.checkpoint, job.engine.unwrap(job.model), job.stepper, job.schedule)
        keep_configured(job.optimizer, job.schedule, configured)
        return int(extra["step"])


def by_layer(names: list[str], norms: StepNorms) -> dict[str, dict[str, float]]:
    """Returns the norms of a step by quantity and parameter name, without what is unknown, and without empty ones."""
    trust = norms.trust if bool((norms.trust.nan_to_num(1.0) != 1.0).any()) else torch.full_like(norms.trust, torch.nan)
    columns = {
        "grad_norm": norms.gradient,
        "trust_ratio": trust,
        "weight_norm": norms.weight,
        "update_norm": norms.update,
        "update_to_weight": (norms.update / norms.weight).where(norms.weight > 0, torch.nan),
    }
    found = {
        key: {name: value for name, value in zip(names, column.tolist()) if value == value}
        for key, column in columns.items()
    }
    return {key: values for key, values in found.items() if values}
