"""The plugin class: all rows search side by side, and each round of their runs is one batch of the launcher."""

from __future__ import annotations

import hashlib
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ._descent import Trial, kept, tune
from ._errors import ComparisonError
from ._options import CoordinateSweeperConf
from ._record import Record
from ._rows import Row, rows
from ._table import Result, printed, write


class CoordinateSweeper(Sweeper):
    """A sweeper that tunes every row by coordinate descent with the same number of runs, and compares them.

    The same command resumes an interrupted comparison: the losses of finished batches of runs are in `losses.jsonl`.
    The search depends on the losses alone, so it takes the same way again, and a run has its old number: with
    `hydra/launcher=accelerate` the finished runs of the interrupted batch are not run again either.

    Args:
        options: The fields of `CoordinateSweeperConf`.
    """

    def __init__(self, **options: Any) -> None:
        self.options: CoordinateSweeperConf = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(CoordinateSweeperConf), options)
        )  # type: ignore[assignment]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's context, and set up the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Result]:
        """Run the comparison, print and write its table.

        Args:
            arguments: The overrides of the command line, which every run has.

        Raises:
            ComparisonError: If the comparison cannot run as it is configured, before a run starts; or if a run fails
                and has not diverged.
        """
        assert self.config is not None and self.hydra_context is not None
        config, loader = self.config, self.hydra_context.config_loader
        known = loader.get_group_options(self.options.group, ObjectType.CONFIG)
        every = rows(self.options, known, lambda words: loader.load_sweep_config(config, [*arguments, *words]))
        self._check_arguments(arguments, every)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        results = self._search(every, arguments)
        write(folder, results)
        print(f"{printed(results)}\n{folder}/comparison.md, .json, .png")
        return results

    def _search(self, every: Sequence[Row], arguments: list[str]) -> list[Result]:
        options, started = self.options, 0
        descents = [row.descent(options.factor) for row in every]
        searches = [tune(descent, options.trials, options.rungs, options.seeds) for descent in descents]
        asked: dict[int, list[Trial]] = {i: next(search) for i, search in enumerate(searches)}
        losses: list[dict[Trial, float]] = [{} for _ in every]
        last: list[list[Trial]] = [[] for _ in every]
        progress = Progress(len(every), options)
        record = Record(Path(str(self.config.hydra.sweep.dir)) / "losses.jsonl", self._identity)  # type: ignore[union-attr]
        while asked:
            batch = [(i, trial) for i, trials in asked.items() for trial in trials]
            words = [[*arguments, *every[i].overrides(trial, options)] for i, trial in batch]
            size = options.max_batch_size or len(batch)
            for at in range(0, len(batch), size):
                some, runs = batch[at : at + size], words[at : at + size]
                found = self._losses(runs, [trial for _, trial in some], started + at, record, progress)
                for (i, trial), loss in zip(some, found):
                    losses[i][trial] = loss
            started += len(batch)
            for i, trials in list(asked.items()):
                last[i] = trials
                try:
                    asked[i] = searches[i].send(losses[i])
                except StopIteration:
                    del asked[i]
        return [
            Result(
                row.name,
                row.settings(trials[0], options),
                [found[trial] for trial in trials],
                [(point[0], loss) for point, loss in descent.losses.items()],
            )
            for row, trials, found, descent in zip(every, last, losses, descents)
        ]

    def _losses(
        self, words: list[list[str]], trials: list[Trial], started: int, record: Record, progress: Progress
    ) -> list[float]:
        """Return the losses of a batch of runs, from the record or from the launcher."""
        began = time.monotonic()
        known = [record.find(run) for run in words]
        found = [loss for loss in known if loss is not None]
        if None in known:
            found = self._launched(words, started)
            for run, loss in zip(words, found):
                record.add(run, loss)
        progress.add(trials, time.monotonic() - began, fresh=None in known)
        return found

    def _launched(self, words: list[list[str]], started: int) -> list[float]:
        self.validate_batch_is_legal(words)
        returned = self.launcher.launch(words, initial_job_idx=started)  # type: ignore[union-attr]
        return [self._loss(result) for result in returned]

    def _identity(self, words: list[str]) -> str:
        assert self.config is not None and self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, words)
        task = {key: value for key, value in cfg.items_ex(resolve=False) if key != "hydra"}
        text = OmegaConf.to_yaml(OmegaConf.create(task), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _loss(self, result: JobReturn) -> float:
        value = result._return_value
        if result.status == JobStatus.COMPLETED:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ComparisonError(f"a run has to return its loss, a number; it returned {value!r}")
            return math.inf if math.isnan(value) else float(value)
        if re.search(self.options.diverged, str(value)):
            return math.inf
        raise ComparisonError(f"a run failed, and has not diverged: {value}; the same command resumes the comparison")

    def _check_arguments(self, arguments: list[str], every: Sequence[Row]) -> None:
        swept = {self.options.group, self.options.steps, self.options.seed} - {self.options.seed}
        swept |= {key for row in every for key in row.keys}
        swept |= {word.partition("=")[0] for words in self.options.variants.values() for word in words}
        for override in OverridesParser.create().parse_overrides(arguments):
            key = override.get_key_element()
            if override.is_sweep_override():
                raise ComparisonError(f"{override.input_line}: a comparison has one value of each key; give one")
            if key in swept:
                raise ComparisonError(
                    f"{override.input_line}: the comparison sets {key}; leave it out, and see hydra.sweeper "
                    "(choices, rungs, coordinates, own)"
                )


class Progress:
    """The runs that are done, and the time that is left, from the seconds per step of the runs so far."""

    def __init__(self, count: int, options: CoordinateSweeperConf) -> None:
        plan = list(zip(options.rungs, kept(options.trials, options.rungs)))
        self.runs = count * (sum(runs for _, runs in plan) + len(options.seeds))
        self.left = count * (sum(s * runs for s, runs in plan) + options.rungs[-1] * len(options.seeds))
        self.done, self.steps, self.seconds = 0, 0, 0.0

    def add(self, trials: Sequence[Trial], seconds: float, fresh: bool) -> None:
        """Add a round, and say how far the comparison is; rounds that were done before do not count for the time."""
        self.done, steps = self.done + len(trials), sum(trial.steps for trial in trials)
        self.left -= steps
        if fresh:
            self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        left = f", about {self.left * self.seconds / self.steps / 60:.0f} min left" if self.steps and self.left else ""
        print(f"comparison: {self.done} of {self.runs} runs{left}", file=sys.stderr, flush=True)
