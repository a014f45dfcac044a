"""A Hydra sweeper that tunes each choice of a config group by coordinate descent, and compares the tuned ones."""
