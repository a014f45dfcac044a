"""The planned memory of a run that is about to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distopt.engine import DeepSpeed
from distopt.optim.base import ShardedOptimizer
from distopt.plan.memory import footprint
from distopt.plan.rehearsal import units_of

if TYPE_CHECKING:
    from distopt.job.job import Job


def planned_bytes(job: Job) -> int | None:
    """Return the bytes of weights, gradients and optimizer state of the process that needs most, without activations.

    None under DeepSpeed, which replaces the parameters by flat partitions, and for another package's optimizer or
    engine.
    """
    if isinstance(job.engine, DeepSpeed) or not isinstance(job.optimizer, ShardedOptimizer):
        return None
    units = units_of(job.engine.unwrap(job.model), job.optimizer)
    try:
        memory = footprint(job.engine, units, job.accelerator.num_processes)
    except ValueError:  # an engine of one's own, without a plan
        return None
    return memory.parameters + memory.gradients + memory.state
