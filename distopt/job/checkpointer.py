"""Saving of a run's checkpoints, one after another, in the background if wanted, and removal of old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distopt import collective
from distopt.checkpoint import Saving, async_save_checkpoint, checkpoint_path, prune_checkpoints, save_checkpoint
from distopt.checkpoint.pruning import link_best
from distopt.checkpoint.save import background_group
from distopt.layout.tensors import local


def all_finite(model: nn.Module) -> bool:
    """Returns whether no parameter of a model has an inf or nan, on any rank; every rank has to call it."""
    shards = [local(p.detach()) for p in model.parameters()]
    norms = torch._foreach_norm([shard for shard in shards if shard.numel()], float("inf"))
    return all(collective.on_all(lambda: bool(torch.stack(norms).isfinite().all()) if norms else True))


class Checkpointer:
    """Saves the checkpoints of a run; every rank has to make one.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of checkpoints to keep, the newest ones.
        keep_every: Checkpoints whose step is a multiple of this stay for good; None for none.
        best: The number in `extra` whose least value makes the best checkpoint, which stays, and to which the link
            `best` in the folder points; None for none.
        asynchronous: Continue training while a checkpoint is written; the next save waits for the one before.

    Attributes:
        written: Called with the folder of each checkpoint when it is on the disk, on every rank.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_every: int | None, best: str | None, asynchronous: bool
    ) -> None:
        self.folder, self.asynchronous = folder, asynchronous
        self.keep, self.keep_every, self.best = keep, keep_every, best
        if asynchronous:
            background_group()
        self.written: Callable[[Path], None] = lambda path: None
        self._saving: tuple[Saving, Path] | None = None

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
            self._saving = async_save_checkpoint(path, *run), path
        else:
            save_checkpoint(path, *run)
            self._end(path)
        return path

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            RuntimeError: On every rank, if one of them could not write.
        """
        if self._saving is not None:
            (saving, path), self._saving = self._saving, None
            saving.result()
            self._end(path)

    def _end(self, path: Path) -> None:
        if self.best is not None:
            link_best(self.folder, self.best)  # first: the link never points to what has been removed
        prune_checkpoints(self.folder, self.keep, keep_every=self.keep_every, best=self.best)
        self.written(path)
