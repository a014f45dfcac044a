"""The options of `hydra/sweeper=coordinate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class CoordinateSweeperConf:
    """The keys of `hydra.sweeper`."""

    _target_: str = "hydra_plugins.hydra_coordinate_sweeper.coordinate_sweeper.CoordinateSweeper"

    # The config group whose choices are compared, and which of them; null: all, and all variants.
    group: str = "optimizer"
    choices: list[str] | None = None
    exclude: list[str] = field(default_factory=list)  # choices that null leaves out
    # Further rows of the table: a name, and the overrides that it stands for; or what a choice stands for, if not for
    # itself alone.
    variants: dict[str, list[str]] = field(default_factory=dict)
    # Gradients that a step of a row computes, where that is not 1: it takes so many times fewer steps.
    gradients: dict[str, int] = field(default_factory=dict)

    # The key of the scale of the learning rate, and the factor between the first values that are tried.
    scale: str = "lr_scale"
    factor: float = 3.0
    # Rows whose scale stays as it is: they estimate their learning rate.
    unscaled: list[str] = field(default_factory=list)
    # Values of the other coordinates, by key: of every row that has the key, and those of one row.
    coordinates: dict[str, list[Any]] = field(default_factory=dict)
    own: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    # Keys whose values are shares of the number of steps.
    shares: list[str] = field(default_factory=list)

    # Steps of the runs of each rung, and how many runs the first rung has; the next keeps the best of them.
    rungs: list[int] = field(default_factory=lambda: [40, 120])
    trials: int = 12
    steps: str = "train.steps"
    # Runs that are given to the launcher at once, and whose losses are then on disk; null: a round of all rows.
    max_batch_size: int | None = None
    # Seeds of the runs that are compared; the search has the configuration's own.
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    seed: str = "seed"
    # A run that fails with an error in which this pattern is found has diverged: it counts as inf.
    diverged: str = "finite"


ConfigStore.instance().store(
    group="hydra/sweeper", name="coordinate", node=CoordinateSweeperConf, provider="hydra_coordinate_sweeper"
)
