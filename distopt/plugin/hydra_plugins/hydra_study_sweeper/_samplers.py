"""The samplers of Optuna: one for every trial, so that a search does not depend on where it was interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GridSampler, QMCSampler

from ._errors import StudyError

Make = Callable[[int], BaseSampler]


class _Grid(GridSampler):
    """The grid of Optuna without its end of `Study.optimize`, which does not run here."""

    def after_trial(self, *args: Any) -> None:
        pass


def sampler(make: Callable[..., BaseSampler], grid: Callable[[], dict[str, list[Any]]]) -> tuple[Make, int | None]:
    """Return what makes the sampler of a trial, and the number of points if that is limited.

    The seed of a trial is its own, of the sampler's seed and the number of the trial: so a search that is resumed makes
    the same proposals, and does not draw those of the first trials again.

    Args:
        make: A sampler without its last arguments, as a functools.partial.
        grid: Returns all values of each key.

    Raises:
        StudyError: For arguments that the sampler does not have or allow.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of what is named in the configuration
    of: Any = getattr(make, "func", make)
    options = dict(getattr(make, "keywords", {}))
    count = None
    if isinstance(of, type) and issubclass(of, GridSampler):
        options["search_space"] = options.get("search_space") or grid()
        of, count = _Grid, int(numpy.prod([len(values) for values in options["search_space"].values()]))
    seed, whole = options.get("seed"), of is _Grid or (isinstance(of, type) and issubclass(of, QMCSampler))

    def trial(number: int) -> BaseSampler:
        own = {} if seed is None or whole else {"seed": _mixed(seed, number)}
        made: BaseSampler = of(**{**options, **own})
        return made

    try:
        trial(0)
    except (TypeError, ValueError, ImportError) as error:
        raise StudyError(f"hydra.sweeper.sampler: {' '.join(str(error).split())}") from None
    return trial, count


def _mixed(seed: int, number: int) -> int:
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1)[0])
