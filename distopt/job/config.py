"""Instantiation of the configuration's sections, and the checks that a single key's bound cannot express."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hydra import utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from distopt.data.batch_sizes import BatchSizes

# In the wheel, conf/ is inside the package; in a checkout, it is next to the package.
_INSIDE = Path(__file__).parents[1] / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "conf"

Config = DictConfig  # a composed configuration, for modules that do not know Hydra


@contextlib.contextmanager
def named(section: str) -> Iterator[None]:
    """Around code that a section of the configuration configures: its exceptions are ValueErrors that name the section.

    Whatever a class or function raises for its arguments is the user's to correct.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        line = f"{kind}{' '.join(str(cause).split())}"
        raise ValueError(line if line.startswith(section) else f"{section}: {line}") from error


def instantiate(cfg: DictConfig, section: str, kind: type | None = None) -> Any:
    """Makes what a section of the configuration names, by `hydra.utils.instantiate`.

    Args:
        cfg: The configuration.
        section: The name of the section.
        kind: The class that it has to make; None for a function.

    Raises:
        ValueError: For what Hydra or the target refuses, and for a target that makes something else.
    """
    with named(section):
        made = utils.instantiate(cfg[section])
        check_kind(made, section, kind)
    return made


def check_kind(made: object, section: str, kind: type | None) -> None:
    """Raises ValueError unless a section has made an instance of a class, or a function where `kind` is None."""
    if not (callable(made) if kind is None else isinstance(made, kind)):
        wanted = "a function (is _partial_ true?)" if kind is None else kind.__name__
        raise ValueError(f"{section}._target_ makes {type(made).__name__}, and not {wanted}")


def refuse_swept_ranks() -> None:
    """Raises ValueError if every process of a launch would run the same sweep, all writing into the same folders.

    A job of Hydra's launchers (basic, joblib, submitit) is one process; distopt's launcher starts several per job.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if HydraConfig.get().mode is RunMode.MULTIRUN and processes > 1:
        raise ValueError(
            f"each of the {processes} processes of the launcher would start this sweep: start it by "
            "`distopt sweep ...`, which gives every job processes of its own"
        )


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


def max_grad_norm(cfg: DictConfig) -> float:
    """The bound of the global gradient norm; inf for none."""
    return math.inf if cfg.train.max_grad_norm is None else cfg.train.max_grad_norm


def check_steps(cfg: DictConfig) -> None:
    """Raises ValueError unless the length of the training is given as steps or as epochs."""
    steps, epochs = cfg.train.steps, cfg.train.epochs
    if (steps is None) == (epochs is None):
        given = [
            f"train.{name}={'null' if cfg.train[name] is None else cfg.train[name]}" for name in ("steps", "epochs")
        ]
        raise ValueError(f"{' and '.join(given)}: give one of them, and null for the other")


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


def check_best(cfg: DictConfig) -> None:
    """Raises ValueError if the best checkpoint is to stay, but not every checkpoint would be evaluated."""
    every, evaluated = cfg.checkpoint.every, cfg.evaluation.every
    if cfg.checkpoint.best is not None and every % evaluated:
        raise ValueError(
            f"checkpoint.best={cfg.checkpoint.best} needs an evaluation with every checkpoint: "
            f"checkpoint.every={every} must be a multiple of evaluation.every={evaluated}"
        )
