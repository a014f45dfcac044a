"""The configuration: where its files are, and the instantiation of its sections."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

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


def max_grad_norm(cfg: DictConfig) -> float:
    """The bound of the global gradient norm; inf for none."""
    return math.inf if cfg.train.max_grad_norm is None else cfg.train.max_grad_norm
