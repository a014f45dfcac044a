"""The trials of a search, in Optuna's storage: asked, told, and taken up again after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.core.utils import JobReturn, JobStatus
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ._errors import StudyError
from ._samplers import Make

JOURNAL = "study.journal"
_RETRIES, _RETRY, _FOLDER, _CONFIGURATION = "retries", "retry", "folder", "configuration"
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def storage(url: Any, folder: Path) -> Any:
    """Return the storage of a URL; by default a journal in a folder, which a network's file system may have."""
    if url is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    if isinstance(url, (str, BaseStorage)):
        return url
    raise StudyError(f"hydra.sweeper.storage must be null, a URL as sqlite:///search.db, or a _target_, got {url!r}")


@dataclass
class Search:
    """The trials of a search.

    Attributes:
        study: The study of Optuna.
        make: Makes the sampler of a trial.
        folder: What marks the trials of this sweep, whose interrupted ones are taken up.
        suggest: Gives a trial its parameters.
    """

    study: Study
    make: Make
    folder: str
    suggest: Callable[[Trial], None]

    def missing(self, count: int) -> int:
        """Return how many of so many trials have not ended; a failed one counts, unless it is tried again."""
        trials = self.study.get_trials(deepcopy=False)
        again = {*self._to_retry, *(trial.user_attrs.get(_RETRIES) for trial in trials)}
        return max(0, count - sum(trial.state.is_finished() and trial.number not in again for trial in trials))

    def ask(self, count: int) -> list[Trial]:
        """Return trials to run: those that were interrupted, then those that are tried again, then new ones."""
        study = self.study
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = [trial for trial in running if trial.user_attrs.get(_FOLDER, "") == self.folder]
        asked = [self._again(trial) for trial in own[:count]]
        while len(asked) < count:
            known = study.get_trials(deepcopy=False)
            study.sampler = self.make(len(known))
            if numbers := self._to_retry:
                study.enqueue_trial(known[numbers[0]].params, user_attrs={_RETRIES: numbers[0]})
                study.set_user_attr(_RETRY, numbers[1:])
            trial = study.ask()
            trial.set_user_attr(_FOLDER, self.folder)
            self.suggest(trial)
            asked.append(trial)
        return asked

    def retry(self, numbers: Sequence[int]) -> None:
        """Have failed trials tried again, by trials with the same values."""
        self.study.set_user_attr(_RETRY, [*self._to_retry, *numbers])

    @property
    def _to_retry(self) -> list[int]:
        return list(self.study.user_attrs.get(_RETRY, ()))

    def _again(self, known: FrozenTrial) -> Trial:
        self.study.sampler = self.make(known.number)
        trial = Trial(self.study, known._trial_id)
        self.suggest(trial)
        return trial

    def tell(self, trial: Trial, result: JobReturn) -> str | None:
        """Tell Optuna how a job has ended; return the reason if it has failed."""
        value: Any = result._return_value
        step = getattr(value, "stopped_at", None)  # of hydra/launcher=accelerate
        if result.status == JobStatus.COMPLETED and step is not None:
            if len(self.study.directions) == 1:
                trial.report(float(value), step)
            self.study.tell(trial, state=TrialState.PRUNED)
            return None
        why = str(value) or type(value).__name__
        if result.status == JobStatus.COMPLETED:
            values, why = _numbers(value, len(self.study.directions))
            if values:
                self.study.tell(trial, values)
                return None
        self.study.tell(trial, state=TrialState.FAIL)
        return why

    def results(self) -> dict[str, Any]:
        """Return the best parameters and value, or those of the Pareto front."""
        if len(self.study.directions) > 1:
            front = [{"params": t.params, "values": t.values} for t in self.study.best_trials]
            return {"name": "optuna", "solutions": front}
        best = self.study.best_trial
        return {"name": "optuna", "best_params": best.params, "best_value": best.value}

    def trials(self) -> dict[str, Any]:
        """Return all trials, for those who read them without Optuna."""
        return {
            "directions": [direction.name.lower() for direction in self.study.directions],
            "trials": [
                {"number": t.number, "state": t.state.name.lower(), "values": t.values, "params": t.params}
                for t in self.study.get_trials(deepcopy=False)
            ],
        }

    def best(self) -> str:
        """Return what the search has found so far, in a few words."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not done:
            return "none has ended with a value"
        if len(self.study.directions) > 1:
            return f"{len(self.study.best_trials)} on the Pareto front"
        best = self.study.best_trial
        said = " ".join(f"{key}={_short(value)}" for key, value in best.params.items())
        return f"the best is #{best.number} {said}: {best.value:.6g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(value: Any, count: int) -> tuple[list[float], str]:
    """The numbers that a program has returned, or why they are none."""
    wanted = "a number" if count == 1 else f"{count} numbers, as hydra.sweeper.direction has"
    try:
        values = [float(value)] if count == 1 else [float(x) for x in value]
    except (TypeError, ValueError):
        return [], f"it has to return {wanted}, and returned {value!r}"
    if len(values) != count or any(x != x for x in values):
        return [], f"it has to return {wanted}, and returned {value!r}"
    return values, ""


def open_study(
    store: Any, name: str, directions: Sequence[str], make: Make, configuration: Mapping[str, Any], own: bool
) -> Study:
    """Open the study of a name, or create it.

    Args:
        store: Optuna's storage, or its URL.
        name: The name.
        directions: minimize or maximize, for each number that a program returns.
        make: Makes the sampler of a trial.
        configuration: What all trials have in common, by key.
        own: Whether the storage is this sweep's alone: then a study without a value is forgotten if it differs.

    Raises:
        StudyError: If it cannot be opened, or its directions or its trials' configuration are others.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def opened() -> Study:
        options: dict[str, Any] = {"study_name": name, "sampler": make(0), "load_if_exists": True}
        return optuna.create_study(storage=store, directions=[*directions], **options)

    common = {"hydra.sweeper.direction": [*directions], **json.loads(json.dumps(configuration, default=str))}
    try:
        study = opened()
        if (differ := _differences(study, common)) and own and not study.get_trials(deepcopy=False, states=_DONE):
            optuna.delete_study(study_name=name, storage=store)
            study, differ = opened(), ""
    except Exception as error:  # of any database
        raise StudyError(f"hydra.sweeper.storage: {' '.join(str(error).split())}") from None
    if differ:
        where = "this folder" if own else f"the study {name}"
        more = "another hydra.sweep.dir, or " if own else ""
        raise StudyError(f"the trials in {where} have {differ}: give {more}another hydra.sweeper.study_name")
    study.set_user_attr(_CONFIGURATION, common)
    return study


def _differences(study: Study, common: Mapping[str, Any]) -> str:
    known = study.user_attrs.get(_CONFIGURATION, common)
    differ = [key for key in sorted({*known, *common}) if known.get(key) != common.get(key)]
    if not differ:
        return ""
    key, more = differ[0], f" ({len(differ) - 1} more keys differ)" if len(differ) > 1 else ""
    return f"{key}={_listed(known.get(key))}, and now it is {_listed(common.get(key))}{more}"


def _listed(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) and len(value) != 1 else str(value).strip("[]'")


def in_sequence(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Divide trials into lists of consecutive numbers, which are those of the jobs."""
    found: list[Trial] = []
    for trial in trials:
        if found and trial.number != found[-1].number + 1:
            yield found
            found = []
        found.append(trial)
    if found:
        yield found
