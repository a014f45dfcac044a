"""Hydra's `hydra/launcher=accelerate`: every job of a sweep under its own `accelerate launch`."""
