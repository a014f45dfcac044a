"""Loading a checkpoint, at any number of processes and on any engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distopt import collective
from distopt.checkpoint import folder as checkpoint_folder
from distopt.checkpoint import manifest
from distopt.checkpoint.save import contents_of, schedule_kind
from distopt.checkpoint.torch_dcp import torch_dcp
from distopt.rng import RandomState, set_random_state


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None = None
) -> dict[str, Any]:
    """Loads a saved run into a model, an optimizer and a schedule. Every rank must call it.

    The number of processes and the engine may differ from those of the save. As with `load_state_dict`, the param
    groups take the saved hyper-parameters (lr, and the schedule's `initial_lr`): set those that are to differ after
    loading. Gradients stay as they are. The random number generators are restored if the number of processes is that of
    the save, and left alone otherwise. Load only checkpoints that you trust: parts of them are pickled.

    Returns:
        The `extra` of the save.

    Raises:
        ValueError: On every rank and before anything is changed, for an incomplete checkpoint, and for one of another
            model (naming the first parameter that differs), of another optimizer (class, state or param groups) or of
            another schedule.
        RuntimeError: If a rank cannot read the checkpoint; the model must not be used afterwards.
    """
    contents = contents_of(model, optimizer)
    optimizer = contents.optimizer
    folder, content = collective.on_first(lambda: checkpoint_folder.open_checkpoint(Path(path)))
    training: dict[str, Any] = {}
    # weights_only would refuse the state of some schedules, and add no safety: DCP's .metadata is a pickle.
    source = folder / checkpoint_folder.TRAINING
    collective.on_all(lambda: training.update(_unpickled(source)))
    try:
        manifest.check_model(content["parameters"], manifest.described(contents.tensors))
        manifest.check_optimizer(content, type(optimizer).__name__, contents.state)
        manifest.check_groups(training["param_groups"], contents.groups)
        described = {name: manifest.described(buffers) for name, buffers in contents.state.items()}
        manifest.check_state(content["state"], described)
        manifest.check_schedule(content["schedule"], schedule_kind(schedule))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error

    read = contents.to_fill(content["state"])
    with torch_dcp(folder) as dcp:
        dcp.load(read, checkpoint_id=folder)
    contents.fill(read, training["param_groups"])
    if schedule is not None:
        schedule.load_state_dict(training["schedule"])
    if len(training["random"]) == collective.world():
        set_random_state(RandomState.from_state_dict(training["random"][collective.rank()]))
    return content["extra"]


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint into a model, wrapped or sharded. Every rank must call it.

    Raises:
        ValueError: On every rank and before anything is changed, for an incomplete checkpoint, and for one of another
            model (naming the first parameter that differs).
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    tensors = get_model_state_dict(model)
    folder, content = collective.on_first(lambda: checkpoint_folder.open_checkpoint(path))
    try:
        manifest.check_model(content["parameters"], manifest.described(tensors))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    read = {"model": tensors}
    with torch_dcp(folder) as dcp:
        dcp.load(read, checkpoint_id=folder)
    set_model_state_dict(model, read["model"])


def _unpickled(file: Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote; raises ValueError for a damaged file."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=False))
    except OSError:
        raise
    except Exception as error:  # of any class, by what the bytes happen to say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be read ({reason}): the checkpoint is damaged, take another") from error


def load_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, in place and in their own dtypes, with the model's tensors of these names in a complete
    checkpoint.

    For a single process without a process group.

    Raises:
        RuntimeError: If a tensor cannot be read; none of them must be used afterwards.
    """
    with torch_dcp(path) as dcp:
        dcp.load({"model": tensors}, checkpoint_id=path, no_dist=True)
