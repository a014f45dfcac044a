"""Saving of a run's checkpoints, one after another, in the background if wanted, and removal of old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distopt import collective
from distopt.checkpoint import Saving, async_save_checkpoint, checkpoint_path, prune_checkpoints, save_checkpoint
from distopt.layout.tensors import local


def all_finite(model: nn.Module) -> bool:
    """Returns whether no parameter of a model has an inf or nan, on any rank; every rank has to call it."""
    shards = [local(p.detach()) for p in model.parameters()]
    norms = torch._foreach_norm([shard for shard in shards if shard.numel()], float("inf"))
    return all(collective.on_all(lambda: bool(torch.stack(norms).isfinite().all()) if norms else True))


class Checkpointer:
    """Saves the checkpoints of a run.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of checkpoints to keep, the newest ones.
        asynchronous: Continue training while a checkpoint is written; the next save waits for the one before.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._saving: Saving | None = None

    def save(self, step: int, *run: Any) -> Path:
        """Saves the checkpoint of a step; every rank has to call it.

        Args:
            step: The number of steps done.
            run: The arguments of `save_checkpoint` after the path.

        Returns:
            The checkpoint's folder.
        """
        self.wait()
        path = checkpoint_path(self.folder, step)
        if self.asynchronous:
            self._saving = async_save_checkpoint(path, *run)
        else:
            save_checkpoint(path, *run)
            prune_checkpoints(self.folder, self.keep)
        return path

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            RuntimeError: On every rank, if one of them could not write.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()
            prune_checkpoints(self.folder, self.keep)
