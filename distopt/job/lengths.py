"""The lengths of a job, which depend on each other: its steps, its batches, and how often it evaluates and saves."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from omegaconf import DictConfig

from distopt.bounds.schedule import check_phases
from distopt.data.batch_sizes import BatchSizes
from distopt.job.schema import is_ours


def check_lengths(cfg: DictConfig, processes: int | None = None) -> None:
    """Checks the keys of a training job whose bounds depend on other keys; each is within its own.

    Args:
        cfg: The configuration.
        processes: How many processes it will have; None if that is not known.

    Raises:
        ValueError: For the first that does not fit the others.
    """
    check_steps(cfg)
    _check_schedule(cfg)
    _check_best(cfg)
    if processes is not None:
        micro_batch = micro_batch_size(cfg.train.batch_size, cfg.train.micro_batch_size, processes)
        check_batch_schedule(cfg, micro_batch, processes)


def micro_batch_size(batch_size: int, micro_batch_size: int | None, world: int) -> int:
    """The number of sequences in one forward pass of a process.

    Args:
        batch_size: Sequences per step, over all processes.
        micro_batch_size: As configured; None for the whole share of a process.
        world: The number of processes.

    Raises:
        ValueError: Unless all processes and passes get the same number.
    """
    share, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"train.batch_size={batch_size} is not a multiple of the {world} processes")
    if micro_batch_size is None:
        return share
    if micro_batch_size < 1 or share % micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size={micro_batch_size} does not divide the {share} sequences of each of {world} "
            f"processes (train.batch_size={batch_size})"
        )
    return micro_batch_size


def check_batch_schedule(cfg: DictConfig, micro_batch: int, world: int) -> BatchSizes:
    """Returns the sizes of the batches of a run, of which each process has the same number of full micro-batches.

    Raises:
        ValueError: For a size of which they have not; and with rollbacks, which pass over batches, so that the size of
            a step would depend on them.
    """
    schedule: Any = cfg.train.get("batch_schedule")
    sizes = BatchSizes(cfg.train.batch_size, None if schedule is None else dict(schedule))
    for step, size in sizes.changes[1:]:
        if size % (micro_batch * world):
            raise ValueError(
                f"train.batch_schedule has {size} sequences from step {step} on, which is not a multiple of "
                f"{micro_batch} sequences in one forward pass of each of {world} processes: give another size, or a "
                "smaller train.micro_batch_size"
            )
    if schedule is not None and (cfg.get("health") or {}).get("action") in ("rollback", "reload"):
        raise ValueError(
            f"train.batch_schedule with health.action={cfg.health.action}, after which batches are passed over, and "
            "the size of a step would depend on it: give clip, skip or warn"
        )
    return sizes


def check_steps(cfg: DictConfig) -> None:
    """Raises ValueError unless the length of the training is given as steps or as epochs."""
    steps, epochs = cfg.train.steps, cfg.train.epochs
    if (steps is None) == (epochs is None):
        given = [
            f"train.{name}={'null' if cfg.train[name] is None else cfg.train[name]}" for name in ("steps", "epochs")
        ]
        raise ValueError(f"{' and '.join(given)}: give one of them, and null for the other")


def _check_schedule(cfg: DictConfig) -> None:
    """Raises ValueError unless the phases of one of distopt's schedules have room in a number of steps."""
    schedule, names = cfg.schedule, ("schedule.warmup_steps", "train.steps", "schedule.decay_steps")
    if "warmup_steps" in schedule and is_ours(schedule):
        check_phases(schedule.warmup_steps, cfg.train.steps, schedule.get("decay_steps"), names)


def refuse_epochs(epochs: float) -> NoReturn:
    """Raises ValueError for a number of epochs of a stream."""
    raise ValueError(
        f"train.epochs={epochs}: how many sequences a stream has is known only once it has been read: give train.steps"
    )


def steps_of(epochs: float, sequences: int | None, batches: BatchSizes) -> int:
    """The number of steps that see the training sequences so many times: the last batch may begin another epoch.

    Args:
        epochs: The number of times, which may be a fraction.
        sequences: The number of training sequences, which is the same at any number of processes; None for a stream.
        batches: Sequences per step.

    Raises:
        ValueError: For a stream.
    """
    if sequences is None:
        refuse_epochs(epochs)
    return batches.steps(math.ceil(round(epochs * sequences, 6)))


def _check_best(cfg: DictConfig) -> None:
    """Raises ValueError if the best checkpoint is to stay, but not every checkpoint would be evaluated."""
    every, evaluated = cfg.checkpoint.every, cfg.evaluation.every
    if cfg.checkpoint.best is not None and every % evaluated:
        raise ValueError(
            f"checkpoint.best={cfg.checkpoint.best} needs an evaluation with every checkpoint: "
            f"checkpoint.every={every} must be a multiple of evaluation.every={evaluated}"
        )
