"""A Hydra sweeper, `hydra/sweeper=optuna`, that searches with Optuna 4 and resumes an interrupted search."""
