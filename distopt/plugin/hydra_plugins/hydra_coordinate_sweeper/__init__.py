"""A Hydra sweeper that tunes each choice of a config group by coordinate descent, and compares the tuned ones.

Hydra (1.3) executes every module of a plugin, and those that it has imported already once more, with classes of their
own; it leaves out those whose names begin with an underscore.
"""
