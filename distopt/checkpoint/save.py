"""Saving a checkpoint, at once or in the background."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distopt import collective
from distopt.checkpoint import folder as checkpoint_folder
from distopt.checkpoint import manifest
from distopt.checkpoint.contents import Contents
from distopt.checkpoint.deepspeed import FlatContents
from distopt.checkpoint.torch_dcp import torch_dcp
from distopt.layout import FlatLayout, unwrap_optimizer
from distopt.optim.base import ShardedOptimizer
from distopt.rng import current_gpu, random_state
from distopt.version import __version__


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Saves a run as one folder. Every rank must call it, on a file system that all ranks share.

    Each rank writes its own shards; replicated tensors are divided among the ranks. The folder is renamed to `path`
    once it is complete and on disk. If a save fails or is killed before that, an earlier checkpoint of this name stays
    as it was, and at most a `.tmp` folder is left, which the next save or `prune_checkpoints` removes.

    The random number generators are saved for every rank. A save changes nothing in memory, except that optimizers of
    distopt create the state that they have not created yet, zeros.

    Args:
        path: The folder; use `checkpoint_path` so that `latest_checkpoint` finds it. An earlier checkpoint is replaced.
        model: A plain model, or one wrapped for DDP, FSDP2 or DeepSpeed. DeepSpeed's flat partitions are reassembled
            one parameter at a time, so that checkpoints do not depend on the engine: weights are float32 wherever they
            are trained in float32. Buffers that differ between ranks are saved from one of them.
        optimizer: An optimizer of distopt, a `SAM` around one, or a torch optimizer whose state consists of tensors and
            numbers. Its param groups are saved too, lr included.
        schedule: A schedule, whose `state_dict` is saved.
        extra: A small JSON-serializable dictionary such as `{"step": 200}`, the same on every rank.
        files: Small files of rank 0 to store in the folder, by name. Loading ignores them.

    Returns:
        The path.

    Raises:
        ValueError: If `extra` does not survive JSON, if `path` exists and is not a checkpoint, or if the optimizer does
            not belong to the model.
        RuntimeError: On every rank, if one of them could not write.
    """
    path = Path(path)
    contents, complete = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    unfinished = checkpoint_folder.unfinished(path)
    try:
        with torch_dcp(path) as dcp:
            dcp.save(contents.saved(), checkpoint_id=unfinished)
        collective.on_first(complete)
    except Exception:
        if collective.rank() == 0:  # every rank has raised, so none still writes, and a full disk needs the space
            checkpoint_folder.remove(unfinished)
        raise
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

    This takes host memory for the rank's shards of weights and state. The folder is renamed to `path` as soon as it is
    complete. Call `result()` on every rank before the next save starts, and before the process ends.
    """
    path = Path(path)
    contents, complete = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    with torch_dcp(path) as dcp:
        # A group of its own, because the ranks communicate in the background while training continues.
        writing = dcp.async_save(
            contents.saved(), checkpoint_id=checkpoint_folder.unfinished(path), process_group=_background_group()
        )
    return Saving(path, writing, complete)


class Saving:
    """A checkpoint that is being written in the background.

    Attributes:
        path: The folder that the checkpoint will have.
    """

    def __init__(self, path: Path, writing: Future[Any], complete: Callable[[], None]) -> None:
        self.path = path
        self._renamed: Future[None] = Future()

        def rename(written: Future[Any]) -> None:  # on rank 0 the write ends after all ranks have written
            try:
                written.result()
                if collective.rank() == 0:
                    complete()
            except BaseException as error:
                self._renamed.set_exception(error)
            else:
                self._renamed.set_result(None)

        writing.add_done_callback(rename)

    def result(self) -> Path:
        """Waits until the checkpoint is on disk under its final name. Every rank must call it.

        Returns:
            The path.

        Raises:
            RuntimeError: On every rank, if one of them could not write.
        """

        def wait() -> None:
            with torch_dcp(self.path):
                self._renamed.result()

        collective.on_all(wait)
        return self.path


def _begin(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> tuple[Contents | FlatContents, Callable[[], None]]:
    """Creates the folder; returns the tensors to write into it, and the function that completes it afterwards."""
    contents = contents_of(model, optimizer)
    optimizer = contents.optimizer
    every = collective.on_all(lambda: (manifest.checked(extra), random_state(*current_gpu()).state_dict()))
    if any(other != every[0][0] for other, _ in every):
        raise ValueError(f"extra must be the same on every rank, got {every[0][0]} on rank 0 and others elsewhere")
    training = {
        "param_groups": contents.groups,
        "schedule": None if schedule is None else copy.deepcopy(schedule.state_dict()),
        "random": [state for _, state in every],
    }
    content = {
        "torch": str(torch.__version__),
        "distopt": __version__,
        "world_size": len(every),
        "parameters": manifest.described(contents.tensors),
        "optimizer": type(optimizer).__name__,
        "state": {name: manifest.described(buffers) for name, buffers in contents.state.items()},
        "schedule": schedule_kind(schedule),
        "extra": every[0][0],
    }
    collective.on_first(lambda: checkpoint_folder.begin(path))
    return contents, lambda: checkpoint_folder.finish(path, training, content, files)


def contents_of(model: nn.Module, optimizer: Optimizer) -> Contents | FlatContents:
    """The contents of a checkpoint of this model and this optimizer, whose missing state is created first."""
    if hasattr(optimizer, "init_state"):  # also SAM's own, where it has some
        optimizer.init_state()
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, ShardedOptimizer) and optimizer.layout.flat:
        return FlatContents(model, optimizer, cast(FlatLayout, optimizer.layout))
    return Contents(model, optimizer)


def schedule_kind(schedule: LRScheduler | None) -> str | None:
    """The class name of a schedule, as the manifest records it."""
    return None if schedule is None else type(schedule).__name__


@functools.cache
def _background_group() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo") if dist.is_initialized() else None
