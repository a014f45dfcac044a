"""A Hydra launcher, `hydra/launcher=accelerate`, that runs every job of a sweep under its own `accelerate launch`."""
