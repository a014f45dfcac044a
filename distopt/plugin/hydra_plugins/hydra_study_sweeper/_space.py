"""The search space: a distribution of Optuna for each override that is a sweep.

Modules whose names begin with `_` import Optuna: Hydra loads the others whenever a program starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from ._errors import StudyError


@dataclass
class Space:
    """What is searched, and what every trial has.

    Attributes:
        searched: The distribution of each key, which has its `+` if it is new to the configuration.
        fixed: The other overrides, by key.
    """

    searched: dict[str, BaseDistribution] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, words: Sequence[str], loader: ConfigLoader) -> Space:
        """Read overrides; of two with the same key the last one counts.

        Raises:
            StudyError: If an override is no search that Optuna can make.
        """
        space = cls()
        try:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides([*words])
        except HydraException as error:
            raise StudyError(f"hydra.sweeper.params: {error}") from None
        for override in parsed:
            key = override.get_key_element()
            space.searched.pop(key, None)
            space.fixed.pop(key, None)
            if override.is_sweep_override():
                space.searched[key] = _distribution(override)
            else:
                space.fixed[key] = str(override.input_line)
        return space

    def suggest(self, trial: Trial) -> None:
        """Give a trial a value for each key; a trial that has one keeps it."""
        for key, found in self.searched.items():
            if isinstance(found, CategoricalDistribution):
                trial.suggest_categorical(key, found.choices)
            elif isinstance(found, IntDistribution):
                trial.suggest_int(key, found.low, found.high, step=found.step, log=found.log)
            elif isinstance(found, FloatDistribution):
                trial.suggest_float(key, found.low, found.high, step=found.step, log=found.log)

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial.

        Raises:
            StudyError: If a function of one's own suggests what is fixed.
        """
        both = [key for key in params if key in self.fixed]
        if both:
            raise StudyError(
                f"{self.fixed[both[0]]} is given, and hydra.sweeper.custom_search_space suggests it: drop one"
            )
        return [*self.fixed.values(), *(f"{key}={value}" for key, value in params.items())]

    def choices(self) -> dict[str, list[Any]]:
        """Return the values of each key that is a choice, which Optuna does not allow to change."""
        found = self.searched.items()
        return {key: [*choice.choices] for key, choice in found if isinstance(choice, CategoricalDistribution)}

    def examples(self) -> list[dict[str, Any]]:
        """Return points of the space, in which each choice occurs."""
        values = {key: _values(found) or [found.low] for key, found in self.searched.items()}  # type: ignore[attr-defined]
        most = max(map(len, self.choices().values()), default=1)
        return [{key: some[min(i, len(some) - 1)] for key, some in values.items()} for i in range(most)]

    def grid(self) -> dict[str, list[Any]]:
        """Return all values of each key.

        Raises:
            StudyError: If a key has more values than can be counted.
        """
        for key, found in self.searched.items():
            if _values(found) is None:
                raise StudyError(
                    f"hydra/sweeper/sampler=grid needs the values of {key}: give a list, or range(start,stop,step), in "
                    f"place of the interval from {found.low} to {found.high}"  # type: ignore[attr-defined]
                )
        return {key: _values(found) or [] for key, found in self.searched.items()}


def _values(found: BaseDistribution) -> list[Any] | None:
    if isinstance(found, CategoricalDistribution):
        return [*found.choices]
    assert isinstance(found, (IntDistribution, FloatDistribution))
    if found.log or found.step is None:
        return None
    if isinstance(found, IntDistribution):
        return [*range(found.low, found.high + 1, found.step)]
    return [found.low + i * found.step for i in range(round((found.high - found.low) / found.step) + 1)]


def _distribution(override: Override) -> BaseDistribution:
    try:
        return _of(override)
    except StudyError:
        raise
    except Exception as error:  # Hydra's and Optuna's own words on bounds and steps
        raise StudyError(f"{override.input_line}: {' '.join(str(error).split())}") from None


def _of(override: Override) -> BaseDistribution:
    value, said = override.value(), override.input_line
    tags: set[str] = getattr(value, "tags", set())
    if unknown := tags - ({"log"} if isinstance(value, IntervalSweep) else set()):
        raise StudyError(f"{said}: an unknown tag {sorted(unknown)[0]}; tag(log,interval(low,high)) has the only one")
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in tags
        if low is None or high is None or not low < high or (log and low <= 0):
            need = "0 < low < high" if log else "low < high"
            raise StudyError(f"{said}: an interval needs {need}, got {low} and {high}")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(low, high, log=log)
    every: list[Any] = [*override.sweep_iterator(transformer=Transformer.identity)]
    if not every:
        raise StudyError(f"{said}: there is no value in it; give at least one")
    if isinstance(value, RangeSweep):
        low, high, step = min(every), max(every), abs(value.step)  # as everywhere in Hydra, without the stop
        if all(isinstance(x, int) for x in every):
            return IntDistribution(low, high, step=int(step))
        return FloatDistribution(low, high, step=float(step)) if low < high else CategoricalDistribution(every)
    return CategoricalDistribution([x if isinstance(x, (int, float)) else Transformer.str(x) for x in every])
