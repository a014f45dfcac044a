"""The bounds of the options of a run's health, and of what is measured beside its steps."""

from __future__ import annotations

from distopt.bounds import Bound, choice, integer, number

BOUNDS: dict[str, Bound] = {
    "action": choice("warn", "clip", "skip", "rollback", "reload"),
    "threshold": number(0.0, above=True),
    "decay": number(0.0, 1.0, below=True),
    "warmup": integer(1),
    "depth_factor": number(1.0, above=True),
    "dead_steps": integer(1),
    "copy_every": integer(1),
    "max_rollbacks": integer(1),
}
# The decay rate of the means of the gradient noise scale.
NOISE_DECAY = number(0.0, 1.0, below=True)
