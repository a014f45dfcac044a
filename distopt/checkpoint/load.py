"""Loading a checkpoint, at any number of processes and on any engine."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distopt import collective
from distopt.checkpoint import flat, manifest, shards
from distopt.checkpoint import index as indices
from distopt.checkpoint.average import SavedAverage, kept_buffers, kept_counts, state_of_groups
from distopt.checkpoint.folder import TRAINING, open_checkpoint
from distopt.checkpoint.plain import loads
from distopt.checkpoint.save import contents_of, schedule_kind
from distopt.checkpoint.storage import storage
from distopt.checkpoint.verify import damage
from distopt.kernels.rounding import BESIDE
from distopt.rng import RandomState, set_random_state

_TRAINING = ("param_groups", "schedule", "random")


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    *,
    keep_groups: bool = False,
) -> dict[str, Any]:
    """Loads a saved run into a model, an optimizer and a schedule. Every rank must call it.

    The number of processes and the engine may differ from those of the save. As with `load_state_dict`, the param
    groups take the saved hyper-parameters (lr, and the schedule's `initial_lr`): set those that are to differ after
    loading. Gradients stay as they are. The random number generators are restored if the number of processes is that of
    the save, and left alone otherwise. An average of the weights (`distopt.EMA`) and buffers of SAM that the
    checkpoint lacks begin anew, and those that the optimizer lacks are left out.

    All files are compared with their checksums first, each rank reading its share of them. Nothing in a checkpoint runs
    code when it is loaded.

    Args:
        path: The checkpoint.
        model: The model, wrapped or sharded.
        optimizer: Its optimizer, or SAM around it.
        schedule: Its schedule, if the checkpoint's is to be resumed.
        keep_groups: Whether the param groups keep their hyper-parameters, and may divide the parameters otherwise than
            those of the checkpoint, as for a phase with another learning rate or radius of SAM in some layers.

    Returns:
        The `extra` of the save.

    Raises:
        ValueError: On every rank and before anything is changed, for a checkpoint that is incomplete or damaged, and
            for one of another model (naming the first parameter that differs), of another optimizer (class, state or
            param groups) or of another schedule.
        RuntimeError: If a rank cannot read the checkpoint; the model must not be used afterwards.
    """
    contents = contents_of(model, optimizer)
    sam, optimizer = optimizer, contents.optimizer
    content = _opened(path)
    training: dict[str, Any] = {}
    collective.on_all(lambda: training.update(_training(path, content)))
    try:
        manifest.check_model(content["parameters"], manifest.described(contents.tensors))
        manifest.check_optimizer(content, type(optimizer).__name__, contents.state)
        groups = training["param_groups"]
        if keep_groups:
            groups = manifest.regrouped(groups, contents.groups, state_of_groups(optimizer))
        else:
            manifest.check_groups(groups, contents.groups)
        described = {name: manifest.described(buffers) for name, buffers in contents.state.items()}
        manifest.check_state(content["state"], described)
        manifest.check_schedule(content["schedule"], schedule_kind(schedule))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    read = contents.to_fill(kept_buffers(content["state"], sam))
    collective.on_all(lambda: _read(path, content, read, training))
    contents.fill(read, kept_counts(groups, optimizer))
    if schedule is not None:
        schedule.load_state_dict(training["schedule"])
    if len(training["random"]) == collective.world():
        set_random_state(RandomState.from_state_dict(training["random"][collective.rank()]))
    return content["extra"]


def load_training_weights(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Loads the weights of a run alone, as `load_checkpoint` does, for an optimizer that has not stepped.

    Unlike `load_model` it runs under DeepSpeed, and fills the float32 masters of 16-bit weights. The optimizer has no
    state afterwards, since a rule may start from the weights.

    Returns:
        The `extra` of the save.

    Raises:
        ValueError: As `load_model`.
    """
    contents = contents_of(model, optimizer)
    content = _opened(path)
    training: dict[str, Any] = {}
    collective.on_all(lambda: training.update(_training(path, content)))
    try:
        manifest.check_model(content["parameters"], manifest.described(contents.tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    read = contents.to_fill({})
    read["optimizer"]["state"] = {}
    collective.on_all(lambda: _read(path, content, read, training))
    contents.fill(read, None)
    for state in contents.optimizer.state.values():
        for name in state.keys() - BESIDE:
            del state[name]
    return content["extra"]


def load_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Loads the weights of a checkpoint into a model, wrapped or sharded. Every rank must call it.

    Raises:
        ValueError: On every rank and before anything is changed, for a checkpoint that is incomplete or damaged, and
            for one of another model (naming the first parameter that differs).
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    tensors = get_model_state_dict(model)
    content = _opened(path)
    try:
        manifest.check_model(content["parameters"], manifest.described(tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    read = {"model": tensors}
    training: dict[str, Any] = {}
    collective.on_all(lambda: training.update(_training(path, content)))
    collective.on_all(lambda: _read(path, content, read, training))
    set_model_state_dict(model, read["model"])


def load_weights(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Fills tensors, in place and in their own dtypes, with the model's tensors of these names in a checkpoint.

    For a single process without a process group.

    Raises:
        ValueError: If the checkpoint is incomplete or damaged; if a tensor cannot be read, in which case none of them
            must be used afterwards.
    """
    content = _opened(path)
    _read(path, content, {"model": tensors}, _training(path, content))


def load_average(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """As `load_weights`, with the average of the weights of each parameter that has one.

    That of `distopt.EMA` or `distopt.LAWA`, or a schedule-free optimizer's own; computed in float32.

    Raises:
        ValueError: As `load_weights`, and for a checkpoint without an average.
    """
    content = _opened(path)
    training = _training(path, content)
    try:
        average = SavedAverage(training["param_groups"], content["state"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _read(path, content, {"model": tensors}, training)
    for name in average.names:
        weights = _zeros(content["parameters"][name])
        buffers = {key: _zeros(content["state"][name][key]) for key in average.buffers(name)}
        _read(path, content, {"model": {name: weights}, "optimizer": {"state": {name: buffers}}}, training)
        tensors[name].copy_(average.of(name, weights, [*buffers.values()]))


def _zeros(described: tuple[list[int], str]) -> Tensor:
    shape, dtype = described
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def _opened(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the manifest of a checkpoint whose files are as they were written; raises ValueError on every rank."""
    content = collective.on_first(lambda: open_checkpoint(path))
    if reason := damage(path, content):
        raise ValueError(f"{path}: {reason}: the checkpoint is damaged, take another")
    return content


def _training(path: str | os.PathLike[str], content: dict[str, Any]) -> dict[str, Any]:
    """Reads training.pt; raises ValueError if it cannot be read."""
    where = manifest.files_of(storage(path), content)
    try:
        found = loads(where.read(TRAINING))
        return {"scalars": [], "objects": {}, **{name: found[name] for name in _TRAINING}, **found}
    except Exception as error:  # of any class, by what the bytes happen to say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path}: {TRAINING} cannot be read ({reason}): the checkpoint is damaged, take another"
        ) from error


def _read(
    path: str | os.PathLike[str], content: dict[str, Any], contents: dict[str, Any], training: dict[str, Any]
) -> None:
    """Fills this rank's part of the tensors of a checkpoint; raises ValueError if some cannot be read."""
    where = manifest.files_of(storage(path), content)
    parts = flat.split(contents)
    try:
        index = indices.read(where, content["format"])
        # Format 1 has scalars among its tensors.
        scalars = {name: value for name, value in flat.scalars(contents).items() if name in index}
        shards.fill(where, index, {**parts.tensors, **scalars})
    except Exception as error:  # of any class, by what the bytes happen to say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: {reason}: the checkpoint is damaged, take another") from error
    flat.fill_rest(contents, training["scalars"], training["objects"])
