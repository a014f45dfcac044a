"""The options of `hydra/sweeper=optuna` and of its samplers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class OptunaSweeperConf:
    """The keys of `hydra.sweeper`, named as those of hydra-optuna-sweeper are."""

    _target_: str = "hydra_plugins.hydra_study_sweeper.optuna_sweeper.OptunaSweeper"
    _recursive_: bool = False  # a sampler is made for every trial
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}])

    # The group hydra/sweeper/sampler, or a `_target_` of one's own with its arguments.
    sampler: Any = MISSING
    # minimize or maximize; a list of them for a program that returns as many numbers.
    direction: Any = "minimize"
    # Where the trials are: null, the file study.journal in the sweep's folder; a URL, as sqlite:///search.db; or a
    # `_target_` with its arguments.
    storage: Any = None
    # null: the trials of this folder.
    study_name: str | None = None
    # The trials in all, those of the interrupted search included.
    n_trials: int = 20
    # Trials that are proposed, and given to the launcher, at a time.
    n_jobs: int = 2
    # The share of the trials of a batch that may fail.
    max_failure_rate: float = 0.0
    # The search space, by key; overrides of the command line are added, and take precedence.
    params: dict[str, Any] | None = None
    # A function of (configuration, trial) that suggests more parameters: package.module.function.
    custom_search_space: str | None = None


SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {
        "_target_": "optuna.samplers.TPESampler",
        "seed": None,
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": False,
        "group": False,
        "constant_liar": True,  # the trials of a batch keep away from each other
    },
    "random": {"_target_": "optuna.samplers.RandomSampler", "seed": None},
    "grid": {"_target_": "optuna.samplers.GridSampler", "seed": None},
    "cmaes": {
        "_target_": "optuna.samplers.CmaEsSampler",
        "seed": None,
        "x0": None,
        "sigma0": None,
        "n_startup_trials": 1,
        "popsize": None,
        "consider_pruned_trials": False,
        "use_separable_cma": False,
        "warn_independent_sampling": True,
    },
    "nsgaii": {
        "_target_": "optuna.samplers.NSGAIISampler",
        "seed": None,
        "population_size": 50,
        "mutation_prob": None,
        "crossover_prob": 0.9,
        "swapping_prob": 0.5,
    },
}
