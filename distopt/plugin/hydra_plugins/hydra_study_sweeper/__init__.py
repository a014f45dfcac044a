"""A Hydra sweeper, `hydra/sweeper=optuna`, that searches with Optuna 4 and resumes an interrupted search.

Hydra (1.3) executes every module of a plugin, and those that it has imported already once more, with classes of their
own; it leaves out those whose names begin with an underscore.
"""
