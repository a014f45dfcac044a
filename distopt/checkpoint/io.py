"""Checkpoints by parameter name, so that a run goes on at another number of processes, or on another engine."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distopt import collective
from distopt.checkpoint import folder as checkpoint_folder
from distopt.checkpoint import manifest
from distopt.checkpoint.contents import Contents
from distopt.checkpoint.deepspeed import FlatContents
from distopt.checkpoint.folder import checkpoint_path, latest_checkpoint
from distopt.layout import FlatLayout
from distopt.layout.wrappers import innermost
from distopt.optim.base import ShardedOptimizer
from distopt.rng import resume_random_state, saved_random_state
from distopt.version import __version__

__all__ = [
    "Saving",
    "async_save_checkpoint",
    "checkpoint_path",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Saves what a run needs to go on, as one folder. Every rank has to call it, on a file system that all of them see.

    Each rank writes the shards that it holds; what all of them hold is divided among them. The folder gets its name
    when it is complete and on the disk. A save that fails or is killed before leaves a checkpoint of that name as it
    was, and at most a `.tmp` folder beside it, which the next save or `prune_checkpoints` removes.

    path: the folder; `checkpoint_path` names it so that `latest_checkpoint` finds it. A checkpoint there is replaced.
    model: plain, or wrapped for DDP, FSDP2 or DeepSpeed, whose flat partitions are put together layer by layer: the
        checkpoint is the same whatever wrote it, with weights in float32 where they are trained in float32. Buffers
        that differ between ranks are saved from one of them.
    optimizer: distopt's, a SAM around one, or a torch optimizer whose state is tensors and numbers. Its param groups
        are saved too, lr included. Saving changes nothing, but that distopt's optimizers get the state they have not
        made yet, zeros.
    schedule: its `state_dict` is saved.
    extra: a small dictionary for JSON, such as {"step": 200}, the same on every rank.
    files: small files of rank 0 to be kept in the folder, by name, for those who read it; loading ignores them.

    The states of the global random number generators (torch's on the CPU and the current GPU, NumPy's, Python's) are
    saved for every rank.
    Returns the path. Raises ValueError for an `extra` that is not the same after JSON, for a path that is something
    else, and for an optimizer that does not belong to the model; RuntimeError, on every rank, if one could not write.
    """
    path = Path(path)
    contents, complete = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    half = checkpoint_folder.half_written(path)
    try:
        with _dcp(path) as dcp:
            dcp.save(contents.saved(), checkpoint_id=half)
        collective.on_first(complete)
    except Exception:
        if collective.rank() == 0:  # every rank has raised, so nobody writes any more, and a full disk needs the space
            checkpoint_folder.remove(half)
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
    """As `save_checkpoint`, but writes in the background: returns when everything has been copied to the host's memory.

    Needs that much host memory: this rank's shards of weights and state. The folder gets its name as soon as it is
    complete. Wait for one save, by `result()` on every rank, before the next one starts and before the process ends.
    """
    path = Path(path)
    contents, complete = _begin(path, model, optimizer, schedule, extra or {}, files or {})
    with _dcp(path) as dcp:
        # A group of its own, since the ranks agree in the background while training goes on.
        writing = dcp.async_save(
            contents.saved(), checkpoint_id=checkpoint_folder.half_written(path), process_group=_background_group()
        )
    return Saving(path, writing, complete)


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, path: Path, writing: Future[Any], complete: Callable[[], None]) -> None:
        self.path = path
        self._named: Future[None] = Future()

        def name(written: Future[Any]) -> None:  # on rank 0 the write ends when all ranks have written
            try:
                written.result()
                if collective.rank() == 0:
                    complete()
            except BaseException as error:
                self._named.set_exception(error)
            else:
                self._named.set_result(None)

        writing.add_done_callback(name)

    def result(self) -> Path:
        """Waits until the checkpoint is on the disk under its name; every rank has to call it.

        Returns the path. Raises RuntimeError, on every rank, if one could not write.
        """

        def wait() -> None:
            with _dcp(self.path):
                self._named.result()

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
    """What is to be written into the folder that has been made for it, and what then completes the folder."""
    contents = _contents(model, optimizer)
    optimizer = contents.optimizer
    every = collective.on_all(lambda: (manifest.checked(extra), saved_random_state()))
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
        "schedule": _kind(schedule),
        "extra": every[0][0],
    }
    collective.on_first(lambda: checkpoint_folder.begin(path))
    return contents, lambda: checkpoint_folder.finish(path, training, content, files)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None = None
) -> dict[str, Any]:
    """Puts a saved run into a model, an optimizer and a schedule. Every rank has to call it.

    The number of processes and the engine may be others than when it was saved. As with `load_state_dict`, the param
    groups have the saved hyper-parameters afterwards (lr, and the schedule's `initial_lr`): set what is to be different
    after loading. Gradients stay as they are. The random number generators (torch's, NumPy's, Python's) resume
    where they were if there are as many processes as then, and are left alone otherwise; a checkpoint without NumPy's
    and Python's, from an earlier version, leaves these alone. Load only what you trust: parts of it are pickled.

    Returns the `extra` of the save. Raises ValueError, on every rank and before anything is changed, for a checkpoint
    that is not complete, of another model (naming the first parameter that differs), of another optimizer (class, state
    or param groups) or another schedule; RuntimeError if a rank cannot read it, after which the model is no good.
    """
    contents = _contents(model, optimizer)
    optimizer = contents.optimizer
    folder, content = collective.on_first(lambda: checkpoint_folder.open_checkpoint(Path(path)))
    training: dict[str, Any] = {}
    # weights_only would refuse what some schedules keep, and add no safety: DCP's .metadata is a pickle.
    source = folder / checkpoint_folder.TRAINING
    collective.on_all(lambda: training.update(torch.load(source, map_location="cpu", weights_only=False)))
    try:
        manifest.check_model(content["parameters"], manifest.described(contents.tensors))
        manifest.check_optimizer(content, type(optimizer).__name__, contents.state)
        manifest.check_groups(training["param_groups"], contents.groups)
        described = {name: manifest.described(buffers) for name, buffers in contents.state.items()}
        manifest.check_state(content["state"], described)
        manifest.check_schedule(content["schedule"], _kind(schedule))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error

    read = contents.to_fill(content["state"])
    with _dcp(folder) as dcp:
        dcp.load(read, checkpoint_id=folder)
    contents.fill(read, training["param_groups"])
    if schedule is not None:
        schedule.load_state_dict(training["schedule"])
    if len(training["random"]) == collective.world():
        resume_random_state(training["random"][collective.rank()])
    return content["extra"]


def load_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, in place and in their dtypes, with those that the model of a complete checkpoint has by that name.

    In one process, without a process group. Raises RuntimeError if they cannot be read, after which they are no good.
    """
    with _dcp(path) as dcp:
        dcp.load({"model": tensors}, checkpoint_id=path, no_dist=True)


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Removes all but the newest `keep` complete checkpoints, and what killed saves have left. Only rank 0 does it.

    What is newer than the oldest that is kept stays even if it is broken. Warns of a folder that cannot be removed.
    Raises ValueError unless `keep` is an integer >= 1.
    """
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise ValueError(f"keep must be an integer >= 1, got {keep!r}; to keep all, do not prune")
    if collective.rank() == 0:
        checkpoint_folder.prune(Path(folder), keep)


def _contents(model: nn.Module, optimizer: Optimizer) -> Contents | FlatContents:
    if hasattr(optimizer, "init_state"):  # of SAM too, where it has some
        optimizer.init_state()
    optimizer = innermost(optimizer)
    if isinstance(optimizer, ShardedOptimizer) and isinstance(optimizer.layout, FlatLayout):
        return FlatContents(model, optimizer, optimizer.layout)
    return Contents(model, optimizer)


def _kind(schedule: LRScheduler | None) -> str | None:
    return None if schedule is None else type(schedule).__name__


@contextlib.contextmanager
def _dcp(path: Path) -> Iterator[Any]:
    """torch.distributed.checkpoint, whose exception is not an Exception and has a traceback for its text."""
    import torch.distributed.checkpoint as dcp  # takes a second, which `import distopt` need not wait

    with warnings.catch_warnings():
        # torch 2.13 (checkpoint/state_dict_saver.py and _loader.py) warns where there is no process group; it is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield dcp
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise collective.FileError(f"{path}: rank {rank}: {type(cause).__name__}: {cause}") from error


@functools.cache
def _background_group() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo") if dist.is_initialized() else None
