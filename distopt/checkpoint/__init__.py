"""Checkpoints that load at any number of processes, on any engine."""

from distopt.checkpoint.folder import checkpoint_path, latest_checkpoint
from distopt.checkpoint.io import (
    Saving,
    async_save_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)

__all__ = [
    "Saving",
    "async_save_checkpoint",
    "checkpoint_path",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "prune_checkpoints",
    "save_checkpoint",
]
