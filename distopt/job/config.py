"""What a run may be: all that is refused before anything that takes time."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePath
from typing import Any

import torch
from hydra import utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from distopt.engine import Engine
from distopt.job import cli

# In the wheel the configuration lies inside the package, in a checkout beside it.
_INSIDE = Path(__file__).parents[1] / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "conf"

Config = DictConfig  # a composed configuration, for modules that do not know Hydra


def instantiate(cfg: DictConfig, group: str) -> Any:
    """Makes what a group of the configuration names, by `hydra.utils.instantiate`.

    Raises:
        ValueError: For what Hydra or the target refuses, naming the group.
    """
    try:
        return utils.instantiate(cfg[group])
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error


# The least that an option may be. Where null is its default, null is right too.
INTEGERS = {
    "seed": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.sequence_length": 1,
    "train.max_skipped_steps": 1,
    "train.prove_every": 0,
    "evaluation.every": 1,
    "evaluation.max_sequences": 1,
    "evaluation.sample_tokens": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}
NULLABLE = ("train.micro_batch_size", "train.max_grad_norm", "train.prove_every", "evaluation.max_sequences")


def check_options(cfg: DictConfig) -> None:
    """Raises ValueError for an option of train.yaml's own that is unknown, out of bounds or of another type."""
    cli.check_keys(cfg, CONF)
    options = cfg.train
    for name, low in INTEGERS.items():
        value = OmegaConf.select(cfg, name)
        if value is None and name in NULLABLE:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an integer >= {low}{' or null' * (name in NULLABLE)}, got {value!r}")
    for name in ("train.max_grad_norm", "train.timeout_minutes", "lr_scale"):
        value = OmegaConf.select(cfg, name)
        if value is None and name in NULLABLE:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            either = ", or null to measure only" if name in NULLABLE else ""
            raise ValueError(f"{name} must be a number > 0{either}, got {value!r}")
    if not isinstance(cfg.checkpoint.asynchronous, bool):
        raise ValueError(f"checkpoint.asynchronous must be true or false, got {cfg.checkpoint.asynchronous!r}")
    if not isinstance(cfg.evaluation.prompt, str):
        raise ValueError(f"evaluation.prompt must be text, got {cfg.evaluation.prompt!r}: quote it twice, as '\"5\"'")
    if not isinstance(options.resume, str):
        raise ValueError(f"train.resume must be never, auto, or a checkpoint's folder, got {options.resume!r}")
    if cfg.param_groups is None:
        raise ValueError("param_groups must not be null; to decay nothing, set optimizer.weight_decay=0")
    parts = PurePath(str(cfg.name)).parts
    if not parts or ".." in parts or cfg.name is None:
        raise ValueError(f"name must be that of a folder below runs/, got {cfg.name!r}")


def refuse_swept_ranks() -> None:
    """Raises ValueError where each process of a launch sweeps by itself: they would all write into the same folders.

    A job of Hydra's launchers (basic, joblib, submitit) is one process; ours gives it several, in a run of its own.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if HydraConfig.get().mode is RunMode.MULTIRUN and processes > 1:
        raise ValueError(
            f"each of the {processes} processes of the launcher would start this sweep: start it by "
            "`python -m distopt.train -m hydra/launcher=accelerate ...`, which gives every job processes of its own"
        )


def dry_run(engine: Engine, make_optimizer: Any, make_schedule: Any, make_sam: Any, steps: int) -> None:
    """Makes optimizer, schedule and SAM for one small tensor: what they refuse they refuse now."""
    try:
        optimizer = make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])
        make_schedule(optimizer, total_steps=steps)
        if make_sam:
            engine.check_sam(make_sam(optimizer))
    except TypeError as error:  # an argument that they do not have, given by +optimizer.name=value
        raise ValueError(str(error)) from error


def micro_batch_size(batch_size: int, micro_batch_size: int | None, world: int) -> int:
    """Sequences in one forward pass of a process; ValueError unless all processes and passes get the same number."""
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
