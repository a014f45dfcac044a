"""The plugin class: batches of trials are proposed by Optuna, run by the launcher, and told to Optuna."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..hydra_accelerate_launcher._alone import alone
from ._errors import StudyError
from ._settings import OptunaSweeperConf

if TYPE_CHECKING:
    from ._space import Space
    from ._study import Search

RESULTS, TRIALS = "optimization_results.yaml", "trials.json"


class OptunaSweeper(Sweeper):
    """A sweeper that searches with Optuna, whose trials are the jobs of any launcher.

    The same command resumes an interrupted search: trials that have ended are in the storage, and those that had not
    run again as the jobs of their numbers. The return value of the program is minimised.

    Args:
        options: The fields of `OptunaSweeperConf`.
    """

    def __init__(self, **options: Any) -> None:
        self.options: Any = OmegaConf.merge(OmegaConf.structured(OptunaSweeperConf), options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's context, and set up the launcher.

        Raises:
            StudyError: If the options do not allow a search, or Optuna is missing.
        """
        self.hydra_context, self.config = hydra_context, config
        self.directions = check(self.options)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are missing, and write what was found into the sweep's folder.

        Args:
            arguments: The overrides of the command line.

        Raises:
            StudyError: If the search cannot run as it is configured, before a trial runs; or if too many trials failed.
        """
        from ._space import Space

        assert self.config is not None and self.hydra_context is not None
        words = [f"{key}={value}" for key, value in (self.options.params or {}).items()]
        space = Space.read([*words, *arguments], self.hydra_context.config_loader)
        if not space.searched and not self.options.custom_search_space:
            raise StudyError(
                "there is nothing to search: give a key several values, as lr=tag(log,interval(1e-4,0.1)) or sam=on,off"
            )
        folder = Path(str(self.config.hydra.sweep.dir))
        self._search(space, folder)

    def _search(self, space: Space, folder: Path) -> None:
        from ._samplers import sampler
        from ._study import Search, open_study, storage

        options = self.options
        make, points = sampler(self._partial(), space.grid)
        configuration = self._compose(space)
        folder.mkdir(parents=True, exist_ok=True)
        # A second search would take up trials that run.
        with alone(folder / ".search.lock", "search", StudyError):
            OmegaConf.save(self.config, folder / "multirun.yaml")
            own = options.storage is None
            name = options.study_name or ("sweep" if own else str(folder))
            url = instantiate(options.storage) if OmegaConf.is_dict(options.storage) else options.storage
            study = open_study(storage(url, folder), name, self.directions, make, configuration, own)
            search = Search(study, make, "" if own else str(folder.absolute()), self._suggest(space))
            count = options.n_trials if points is None else min(options.n_trials, points)
            left = search.missing(count)
            if left < count:
                _say(f"search: {count - left} of {count} trials were done before; {search.best()}")
            while left > 0:
                left -= self._batch(search, space, min(left, options.n_jobs), folder)
                _say(f"search: {count - left} of {count} trials; {search.best()}")
            self._end(search, folder)

    def _batch(self, search: Search, space: Space, count: int, folder: Path) -> int:
        """Run a batch of trials; return their number."""
        from ._study import in_sequence

        try:
            trials = search.ask(count)
        except ValueError as error:
            raise StudyError(f"hydra.sweeper: Optuna refuses to propose a trial: {_line(error)}") from None
        _write(folder / TRIALS, search.trials())
        failures: dict[int, str] = {}
        for some in in_sequence(trials):
            words = [space.words(trial.params) for trial in some]
            returned: Sequence[JobReturn] = self.launcher.launch(words, initial_job_idx=some[0].number)  # type: ignore[union-attr]
            for trial, result in zip(some, returned):
                if why := search.tell(trial, result):
                    failures[trial.number] = why
        _write(folder / TRIALS, search.trials())
        if len(failures) / len(trials) > self.options.max_failure_rate:
            search.retry([*failures])
            first = next(iter(failures))
            raise StudyError(
                f"{len(failures)} of {len(trials)} trials failed, with hydra.sweeper.max_failure_rate="
                f"{self.options.max_failure_rate}; the same command tries them again; #{first}: {failures[first]}"
            )
        return len(trials)

    def _end(self, search: Search, folder: Path) -> None:
        try:
            results = search.results()
        except ValueError:
            raise StudyError("no trial has ended with a value, so there is no best one") from None
        OmegaConf.save(OmegaConf.create(results), folder / RESULTS)
        _say(f"search: {folder / RESULTS}")

    def _partial(self) -> Any:
        try:
            return instantiate(self.options.sampler, _partial_=True, _convert_="all")
        except Exception as error:
            raise StudyError(f"hydra.sweeper.sampler: {_line(error)}") from None

    def _suggest(self, space: Space) -> Any:
        path = self.options.custom_search_space
        if path is None:
            return space.suggest
        try:
            own = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise StudyError(f"hydra.sweeper.custom_search_space={path}: {_line(error)}") from None

        def suggest(trial: Any) -> None:
            space.suggest(trial)
            own(self.config, trial)

        return suggest

    def _compose(self, space: Space) -> dict[str, Any]:
        """Compose jobs of the space, so that a mistyped key is told at once; return what all trials have."""
        assert self.config is not None and self.hydra_context is not None
        loader, config = self.hydra_context.config_loader, self.config
        for point in space.examples():
            loader.load_sweep_config(config, space.words(point))
        cfg = loader.load_sweep_config(config, [*space.fixed.values()])
        task = OmegaConf.create({key: value for key, value in cfg.items_ex(resolve=False) if key != "hydra"})
        searched = {key.lstrip("+") for key in space.searched}
        flat = dict(_flat(OmegaConf.to_container(task, resolve=False)))
        return {key: value for key, value in flat.items() if key not in searched} | space.choices()


def check(options: Any) -> list[str]:
    """Check the options; return the directions.

    Raises:
        StudyError: If an option is out of bounds, or Optuna is missing or too old.
    """
    if importlib.util.find_spec("optuna") is None:
        raise StudyError("hydra/sweeper=optuna needs Optuna: pip install 'distopt[sweep]'")
    from importlib.metadata import version as installed  # here: every start of Hydra imports this module

    version = installed("optuna")
    if int(version.partition(".")[0]) < 4:
        raise StudyError(
            f"hydra/sweeper=optuna needs Optuna >= 4, and {version} is installed: pip uninstall hydra-optuna-sweeper, "
            "which needs the old one, then pip install 'optuna>=4'"
        )
    for name in ("n_trials", "n_jobs"):
        if options[name] < 1:
            raise StudyError(f"hydra.sweeper.{name} must be >= 1, got {options[name]}")
    if not 0.0 <= options.max_failure_rate <= 1.0:
        raise StudyError(f"hydra.sweeper.max_failure_rate must be >= 0 and <= 1, got {options.max_failure_rate}")
    seed = OmegaConf.select(options, "sampler.seed")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise StudyError(f"hydra.sweeper.sampler.seed must be an integer >= 0 or null, got {seed}")
    target = str(OmegaConf.select(options, "sampler._target_", default=""))
    if target.endswith("CmaEsSampler") and importlib.util.find_spec("cmaes") is None:
        raise StudyError("hydra/sweeper/sampler=cmaes needs a package of its own: pip install cmaes")
    several = isinstance(options.direction, ListConfig)
    directions = [str(name) for name in (options.direction if several else [options.direction])]
    for name in directions or [""]:
        if name not in ("minimize", "maximize"):
            raise StudyError(f"hydra.sweeper.direction must be minimize, maximize or a list of these, got {name!r}")
    return directions


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], config


def _write(file: Path, found: dict[str, Any]) -> None:
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    aside.replace(file)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
