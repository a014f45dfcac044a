"""A Hydra launcher, `hydra/launcher=accelerate`, that runs every job of a sweep under its own `accelerate launch`.

Hydra (1.3) executes every module of a plugin, and those that it has imported already once more, with classes of their
own; it leaves out those whose names begin with an underscore.
"""
