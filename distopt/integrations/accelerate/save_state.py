"""Makes Accelerate's save_state and load_state write and read model and optimizer as one distopt checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from distopt import collective
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.integrations.accelerate.private import prepared_models, prepared_optimizers
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

_FOLDER = "distopt"  # in the folder of save_state


def keep_in_folder(accelerator: Accelerator) -> None:
    """Makes save_state write model and optimizer as a distopt checkpoint, and load_state read it.

    Accelerate itself writes only the shards of rank 0. The hooks keep neither model nor optimizer alive, so that
    `free_memory` frees them; a later call replaces the hooks.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        check_single(accelerator)
        if not accelerator.sync_gradients:
            raise ValueError(
                "save_state between the micro-batches of a step loses their gradients: "
                "call it where accelerator.sync_gradients"
            )
        (optimizer,) = prepared_optimizers(accelerator)
        save_checkpoint(Path(folder) / _FOLDER, models[0], optimizer, extra={"step": accelerator.step})
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        check_single(accelerator)
        if not collective.on_first(lambda: [path.name for path in Path(folder).glob(f"{_FOLDER}*")]):
            raise ValueError(
                f"{folder} was saved without distopt.attach: load it without, and if it has full state (one process "
                "or DDP, without zero_stage=1) save it again after attach(zero_stage=0)"
            )
        (optimizer,) = prepared_optimizers(accelerator)
        extra = load_checkpoint(Path(folder) / _FOLDER, models[0], optimizer)
        accelerator.step = extra["step"]  # Accelerate's own is in one file for each process that there was
        models.clear()

    for handle in accelerator.__dict__.pop("_distopt_hooks", ()):
        handle.remove()
    handles = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    accelerator.__dict__["_distopt_hooks"] = handles
    optimizers = prepared_optimizers(accelerator)
    optimizers[0] = _without_state(optimizers[0])


def check_single(accelerator: Accelerator) -> None:
    """Raises ValueError unless one model and one optimizer are prepared."""
    models, optimizers = len(prepared_models(accelerator)), len(prepared_optimizers(accelerator))
    if (models, optimizers) != (1, 1):
        raise ValueError(
            f"{models} models and {optimizers} optimizers were prepared, attach is for one of each: "
            "make another Accelerator for the others, or leave them out of prepare if they are not trained"
        )


def refuse_files(optimizer: ShardedOptimizer) -> None:
    """Makes pickling the optimizer's state dict raise: the file of one process would lose the shards of all others."""
    optimizer.register_state_dict_post_hook(lambda _, state: _Shards(state))


class _Shards(dict[str, Any]):
    """A state dict of this process's shards, which can be read, loaded and copied, but not written to a file."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "the optimizer's state is sharded over the processes (zero_stage=1), and a file would have one shard: "
            "use accelerator.save_state or distopt.checkpoint.save_checkpoint"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shards:
        return _Shards(copy.deepcopy(dict(self), memo))


def _without_state(optimizer: Any) -> Any:
    """Returns a stand-in for a prepared optimizer in Accelerate's list, which saves and loads nothing.

    Accelerate 1.15 has hooks before it saves and loads, but none that replace its handling of optimizers.
    """
    methods = {
        "state_dict": lambda self: {"distopt": f"the state is in the folder {_FOLDER}"},
        "load_state_dict": lambda self, state_dict: None,  # the hook has loaded it
    }
    listed: Any = object.__new__(type("Attached", (type(optimizer),), methods))
    listed.__dict__ = optimizer.__dict__
    return listed
