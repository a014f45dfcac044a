"""The rows of a comparison: what each stands for, which settings it has, and the overrides of its runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ._descent import Descent, Trial
from ._errors import ComparisonError
from ._options import CoordinateSweeperConf


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Its name.
        words: The overrides that it stands for.
        keys: The key of the learning rate's scale, then those of the other coordinates.
        ladders: The values of the other coordinates.
        start: The values that the configuration has, with which the search starts.
        gradients: The gradients that one of its steps computes.
        scaled: Whether the learning rate is tuned.
    """

    name: str
    words: tuple[str, ...]
    keys: tuple[str, ...]
    ladders: tuple[tuple[Any, ...], ...]
    start: tuple[Any, ...]
    gradients: int
    scaled: bool

    def descent(self, factor: float) -> Descent:
        """Return the search for the best settings of this row."""
        return Descent(self.ladders, self.start, factor if self.scaled else 1.0)

    def steps(self, trial: Trial) -> int:
        """Return the number of steps of a run: as many gradients for every row."""
        return trial.steps // self.gradients

    def settings(self, trial: Trial, options: CoordinateSweeperConf) -> dict[str, str]:
        """Return the values of a run, as overrides take them."""
        steps = self.steps(trial)
        return {
            key: text(round(value * steps) if key in options.shares else value)
            for key, value in zip(self.keys, trial.point)
        }

    def overrides(self, trial: Trial, options: CoordinateSweeperConf) -> list[str]:
        """Return the overrides of a run."""
        settings = self.settings(trial, options) | {options.steps: str(self.steps(trial))}
        if trial.seed is not None:
            settings[options.seed] = str(trial.seed)
        return [*self.words, *(f"{key}={value}" for key, value in settings.items())]


def text(value: Any) -> str:
    """Return a value as Hydra's grammar takes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows(
    options: CoordinateSweeperConf, known: Sequence[str], composed: Callable[[list[str]], DictConfig]
) -> list[Row]:
    """Return the rows of the table.

    Args:
        options: The options of the sweeper.
        known: The choices of the group.
        composed: Composes the configuration of a run from its overrides.

    Raises:
        ComparisonError: If a number is out of its bounds, or a row or a key does not exist.
    """
    check(options)
    names = [*known, *options.variants]
    given_names = {
        name: getattr(options, name) or () for name in ("choices", "exclude", "own", "gradients", "unscaled")
    }
    for where, given in given_names.items():
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                meant = f" Did you mean {near[0]}?" if near else ""
                raise ComparisonError(
                    f"hydra.sweeper.{where}: there is no {options.group} {name}.{meant} There are {', '.join(names)}"
                )
    every = [name for name in names if name not in options.exclude]
    chosen = list(dict.fromkeys(options.choices if options.choices is not None else every))
    return [_row(name, options, composed) for name in chosen]


def _row(name: str, options: CoordinateSweeperConf, composed: Callable[[list[str]], DictConfig]) -> Row:
    words = options.variants.get(name, [f"{options.group}={name}"])
    cfg, own = composed(list(words)), options.own.get(name, {})
    found: dict[str, Any] = {}
    for key in (options.scale, options.steps, options.seed, *own, *options.coordinates):
        value = _value(cfg, key)
        if value is not None:
            found[key] = value
        elif key not in options.coordinates:
            where = f"hydra.sweeper.own.{name}: " if key in own else "hydra.sweeper: "
            raise ComparisonError(f"{where}{name} has no {key}; give a key that `--cfg job {' '.join(words)}` prints")
    ladders = {key: values for key, values in {**own, **options.coordinates}.items() if key in found}
    for key in ladders.keys() & set(options.shares):
        found[key] = round(found[key] / found[options.steps], 3)
    steps = {key: _ladder(key, [*values, found[key]]) for key, values in ladders.items()}
    start = (float(found[options.scale]), *(_hashed(found[key]) for key in steps))
    gradients, scaled = options.gradients.get(name, 1), name not in options.unscaled
    return Row(name, tuple(words), (options.scale, *steps), tuple(steps.values()), start, gradients, scaled)


def _value(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _ladder(key: str, values: list[Any]) -> tuple[Any, ...]:
    """Return the values in order, with that of the configuration among them."""
    try:
        return tuple(sorted({_hashed(value) for value in values}))
    except TypeError:
        raise ComparisonError(
            f"hydra.sweeper: {key} has no order, got {values}; give numbers, or lists of them"
        ) from None


def _hashed(value: Any) -> Any:
    return tuple(map(_hashed, value)) if isinstance(value, (list, tuple)) else value


def check(options: CoordinateSweeperConf) -> None:
    """Check the numbers of a comparison.

    Raises:
        ComparisonError: If one is out of its bounds.
    """
    rungs, seeds, most = list(options.rungs), list(options.seeds), max([1, *options.gradients.values()])
    if options.trials < 1:
        raise ComparisonError(f"hydra.sweeper.trials must be >= 1, got {options.trials}: runs of the search, each row")
    if not rungs or rungs[0] < most or sorted(set(rungs)) != rungs:
        raise ComparisonError(
            f"hydra.sweeper.rungs must be increasing numbers of steps, >= {most}, got {rungs}; as [40,120]"
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ComparisonError(f"hydra.sweeper.seeds must be different integers >= 0, got {seeds}; as [1,2,3]")
    if not options.factor > 1:
        raise ComparisonError(f"hydra.sweeper.factor must be > 1, got {options.factor:g}; as 3")
    if options.choices is not None and not options.choices:
        raise ComparisonError("hydra.sweeper.choices is empty; name what to compare, or null for all")
    if min([1, *options.gradients.values()]) < 1:
        raise ComparisonError("hydra.sweeper.gradients must be >= 1: the gradients that a step computes")
    for name, count in options.gradients.items():
        if any(steps % count for steps in rungs):
            raise ComparisonError(
                f"hydra.sweeper.rungs must be multiples of {count}, the gradients of a step of {name}, got {rungs}: "
                "otherwise it would compute fewer than the others"
            )
    if options.max_batch_size is not None and options.max_batch_size < 1:
        raise ComparisonError(f"hydra.sweeper.max_batch_size must be >= 1, or null, got {options.max_batch_size}")
