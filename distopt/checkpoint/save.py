"""Saving a checkpoint, at once or in the background."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distopt import collective
from distopt.checkpoint import flat, manifest, shards
from distopt.checkpoint import folder as checkpoint_folder
from distopt.checkpoint.contents import Contents
from distopt.checkpoint.deepspeed import FlatContents
from distopt.checkpoint.pieces import Plans, pieces
from distopt.checkpoint.plain import checked, plain
from distopt.checkpoint.storage import PathLike
from distopt.checkpoint.writing import Writing
from distopt.layout import FlatLayout, unwrap_optimizer
from distopt.layout.names import bare_parameters
from distopt.optim.base import ShardedOptimizer
from distopt.rng import current_gpu, random_state
from distopt.version import __version__

_plans = Plans()
_buffers: list[Tensor] = []  # of host memory, for saves in the background


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Any:
    """Saves a run as one folder. Every rank must call it, on a file system that all ranks share.

    Each rank writes its own shards; replicated tensors are divided among the ranks, at the first save of a model once
    for all. The checkpoint is complete once its manifest is written, after everything else is on disk. If a save fails
    or is killed before that, an earlier checkpoint of this name stays as it was, and at most a folder without a
    manifest is left, which `prune_checkpoints` removes.

    Every file has a checksum in the manifest, the manifest has its own, and the fingerprint of what was saved stands
    beside them.

    The random number generators are saved for every rank. A save changes nothing in memory, except that optimizers of
    distopt create the state that they have not created yet, zeros.

    Args:
        path: The folder, local or a URL of fsspec such as `s3://bucket/run/step_00000200`; use `checkpoint_path` so
            that `latest_checkpoint` finds it. An earlier checkpoint is replaced.
        model: A plain model, or one wrapped for DDP, FSDP2 or DeepSpeed. DeepSpeed's flat partitions are reassembled
            one parameter at a time, so that checkpoints do not depend on the engine: weights are float32 wherever they
            are trained in float32. Buffers that differ between ranks are saved from one of them.
        optimizer: An optimizer of distopt, a `SAM` around one, or a torch optimizer whose state consists of tensors and
            numbers. Its param groups are saved too, lr included.
        schedule: A schedule, whose `state_dict` is saved; it consists of numbers, text, lists and dictionaries.
        extra: A small JSON-serializable dictionary such as `{"step": 200}`, the same on every rank.
        files: Small files of rank 0 to store in the folder, by name. Loading ignores them.

    Returns:
        The path.

    Raises:
        ValueError: If `extra` does not survive JSON, if `path` exists and is not a checkpoint, if the optimizer does
            not belong to the model, or if a state cannot be loaded without running code.
        RuntimeError: On every rank, if one of them could not write.
    """
    saving = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    outcome = saving.write(saving.values, None)
    collective.on_first(lambda: _raise(outcome))
    return path


def async_save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Saving:
    """Saves as `save_checkpoint` does, but in the background: returns once everything is copied to host memory.

    This takes host memory for the rank's shards of weights and state, which later saves use again. Call `result()` on
    every rank before the next save starts, and before the process ends.
    """
    saving = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    buffer = _buffer(saving.plan.size)
    staged = shards.stage(saving.plan, saving.values, buffer)
    saving.values = {}  # they may change from now on
    written: Future[None] = Future()

    def write() -> None:
        # In a group of its own, because the ranks communicate in the background while training continues.
        outcome = saving.write(staged, group)
        _buffers.append(buffer)
        if outcome is None:
            written.set_result(None)
        else:
            written.set_exception(outcome)

    group = background_group()
    threading.Thread(target=write, name="distopt checkpoint").start()
    return Saving(path, written)


class Saving:
    """A checkpoint that is being written in the background.

    Attributes:
        path: The folder that the checkpoint will have.
    """

    def __init__(self, path: Any, written: Future[None]) -> None:
        self.path = path
        self._written = written

    def result(self) -> Any:
        """Waits until the checkpoint is complete. Every rank must call it.

        Returns:
            The path.

        Raises:
            RuntimeError: On every rank, if one of them could not write.
        """
        error = self._written.exception()
        collective.on_first(lambda: _raise(error))
        return self.path


def _begin(
    path: PathLike,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Writing:
    """Agrees on what each rank writes, and creates the folder."""
    contents = contents_of(model, optimizer)
    optimizer = contents.optimizer
    parts = flat.split(contents.saved())
    values = dict(pair for name, tensor in parts.tensors.items() for pair in pieces(name, tensor))
    every = collective.on_all(lambda: (manifest.checked(extra), _plans.token([*values])))
    if any(other != every[0][0] for other, _ in every):
        raise ValueError(f"extra must be the same on every rank, got {every[0][0]} on rank 0 and others elsewhere")
    tokens = {token for _, token in every}
    plan = _plans.get([*values], agreed=len(tokens) == 1 and None not in tokens)
    training = {
        "param_groups": contents.groups,
        "schedule": None if schedule is None else schedule.state_dict(),
        "scalars": parts.scalars,
        "objects": parts.objects,
    }
    # Now: what it contains changes in training. Every rank, so that all of them refuse the same.
    training = checked(training, f"the state of {type(optimizer).__name__}, of the model or of the schedule")
    content = {
        "torch": str(torch.__version__),
        "distopt": __version__,
        "world_size": len(every),
        "parameters": manifest.described(contents.tensors),
        "optimizer": type(optimizer).__name__,
        "state": {name: manifest.described(buffers) for name, buffers in contents.state.items()},
        "schedule": schedule_kind(schedule),
        "extra": every[0][0],
        "fingerprinted": [*bare_parameters(contents.model)],
    }
    nonce = collective.on_first(lambda: checkpoint_folder.begin(path))
    return Writing(
        path, nonce, plan, values, plain(random_state(*current_gpu()).state_dict()), content, training, files
    )


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _buffer(size: int) -> Tensor:
    """Returns host memory of at least this size in bytes, pinned where there is a GPU: that of an earlier save."""
    while _buffers:
        buffer = _buffers.pop()
        if buffer.numel() >= size:
            return buffer
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def contents_of(model: nn.Module, optimizer: Optimizer) -> Contents | FlatContents:
    """The contents of a checkpoint of this model and this optimizer, whose missing state is created first."""
    stateful = unwrap_optimizer(optimizer, lambda inner: hasattr(inner, "init_state"))  # SAM makes its own as well
    if hasattr(stateful, "init_state"):
        stateful.init_state()
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, ShardedOptimizer) and optimizer.layout.flat:
        return FlatContents(model, optimizer, cast(FlatLayout, optimizer.layout))
    return Contents(model, optimizer)


def schedule_kind(schedule: LRScheduler | None) -> str | None:
    """The class name of a schedule, as the manifest records it."""
    return None if schedule is None else type(schedule).__name__


@functools.cache
def background_group() -> dist.ProcessGroup | None:
    """Returns the group in which ranks communicate in the background; every rank has to call it.

    The first call makes it, and needs the store in which the ranks have met. A job asks at its start: the store is the
    launcher's, and ranks whose launcher was killed still save.
    """
    return dist.new_group(backend="gloo") if dist.is_initialized() else None
