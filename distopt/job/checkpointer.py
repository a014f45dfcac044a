"""The checkpoints of a run: saved one after another, in the background if wanted, the old ones removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distopt.checkpoint import Saving, async_save_checkpoint, checkpoint_path, prune_checkpoints, save_checkpoint


class Saver:
    """Saves the checkpoints of a folder and keeps the newest `keep`.

    asynchronous: training goes on while a checkpoint is being written; the next one waits until it is.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._saving: Saving | None = None

    def save(self, step: int, *run: Any) -> Path:
        """Saves what `save_checkpoint` takes as the checkpoint of a step; returns its path. Every rank calls it."""
        self.wait()
        path = checkpoint_path(self.folder, step)
        if self.asynchronous:
            self._saving = async_save_checkpoint(path, *run)
        else:
            save_checkpoint(path, *run)
            prune_checkpoints(self.folder, self.keep)
        return path

    def wait(self) -> None:
        """Returns when what is being written is on the disk; raises RuntimeError, on every rank, if it cannot be."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()
            prune_checkpoints(self.folder, self.keep)
