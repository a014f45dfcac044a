"""Checkpoints that load at any number of processes and on any engine."""

from distopt.checkpoint.folder import checkpoint_path, latest_checkpoint
from distopt.checkpoint.load import load_average, load_checkpoint, load_model, load_training_weights, load_weights
from distopt.checkpoint.pruning import best_checkpoint, prune_checkpoints
from distopt.checkpoint.save import Saving, async_save_checkpoint, save_checkpoint
from distopt.checkpoint.verify import intact_checkpoint, verify

__all__ = [
    "Saving",
    "async_save_checkpoint",
    "best_checkpoint",
    "checkpoint_path",
    "intact_checkpoint",
    "latest_checkpoint",
    "load_average",
    "load_checkpoint",
    "load_model",
    "load_training_weights",
    "load_weights",
    "prune_checkpoints",
    "save_checkpoint",
    "verify",
]
