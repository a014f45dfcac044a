"""The callbacks of a run, called on all ranks together: the list `callbacks`, and early stopping."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra import utils
from omegaconf import OmegaConf
from torch import Tensor

from distopt import collective
from distopt.job.config import Config, named
from distopt.job.protocols import Callback, RunState

if TYPE_CHECKING:
    from distopt.job.job import Job

TIMES = ("after_step", "after_evaluation", "after_checkpoint")


class Callbacks:
    """Calls callbacks; if one of them raises on a rank, all ranks raise the same, so that none waits for it.

    Args:
        callbacks: The callbacks by name, called in this order.

    Attributes:
        stopped: Why one of them has asked the run to stop; None while none has.

    Raises:
        ValueError: For an object with none of the methods, or with one that looks like another misspelt.
    """

    def __init__(self, callbacks: Mapping[str, Any]) -> None:
        self._callbacks = dict(callbacks)
        self.stopped: str | None = None
        for name, callback in self._callbacks.items():
            _check(name, callback)

    @classmethod
    def of(cls, cfg: Config) -> Callbacks:
        """Makes the callbacks of a configuration; every rank has to call it.

        Raises:
            ValueError: On every rank, with the name of the callback at fault.
        """
        made: dict[str, Any] = {}
        if not cfg.get("callbacks") and not cfg.get("early_stopping"):
            return cls(made)

        def make() -> None:
            entries: Any = OmegaConf.to_container(cfg.callbacks, resolve=True) if cfg.get("callbacks") else []
            for i, entry in enumerate(entries):
                target = str(entry["_target_"])
                with named(f"callbacks[{i}], {target}"):
                    callback = utils.instantiate({"_convert_": "all", **entry})
                name, number = target, 2
                while name in made:
                    name, number = f"{target} {number}", number + 1
                made[name] = callback
            if cfg.get("early_stopping"):
                with named("early_stopping"):
                    made["early_stopping"] = utils.instantiate(cfg.early_stopping)
            cls(made)

        collective.on_all(make)
        return cls(made)

    def wants(self, name: str) -> bool:
        """Returns whether any of them has a method of this name."""
        return any(_overrides(callback, name) for callback in self._callbacks.values())

    def call(self, when: str, job: Job, metrics: Mapping[str, float]) -> dict[str, float]:
        """Calls those that want to be called then; every rank has to call it.

        Args:
            when: The name of the method.
            job: The job.
            metrics: `RunState.metrics`.

        Returns:
            The numbers that they return, by name: the means over the ranks.

        Raises:
            ValueError: On every rank, for an exception on any, with the name of the callback.
        """
        added: dict[str, float] = {}
        row = {} if when == "after_checkpoint" else metrics  # which is a row of its own
        for name, callback in self._callbacks.items():
            if _overrides(callback, when):
                run, there = _state(job, {**metrics, **added}), {"step", *row, *added}
                added |= self._call(f"{name}.{when}", getattr(callback, when), run, there)
        return added

    def _call(self, name: str, method: Any, run: RunState, there: set[str]) -> dict[str, float]:
        def task() -> tuple[dict[str, float], list[str]]:
            with named(name + (f" on rank {run.rank}" if run.world > 1 else "")):
                numbers = _numbers(method(run))
                if twice := numbers.keys() & there:
                    raise ValueError(f"it returns {min(twice)!r}, which the row has already: give another name")
                return numbers, run._reasons

        found = collective.on_all(task)
        self.stopped = self.stopped or next((reason for _, reasons in found for reason in reasons), None)
        values: dict[str, list[float]] = {}
        for numbers, _ in found:
            for key, value in numbers.items():
                values.setdefault(key, []).append(value)
        return {key: sum(each) / len(each) for key, each in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of those that have one, by name; every rank has to call it, and gets those of rank 0."""

        def states() -> dict[str, Any]:
            kept = {}
            for name, callback in self._callbacks.items():
                if _overrides(callback, "state_dict"):
                    with named(f"{name}.state_dict"):
                        kept[name] = callback.state_dict()
                        if json.loads(json.dumps(kept[name], allow_nan=False)) != kept[name]:
                            raise ValueError("it must be the same after JSON: keys are strings, and lists no tuples")
            return kept

        if not self.wants("state_dict"):
            return {}
        return collective.on_first(states)

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Gives each its state; one that is new to the run begins anew, and the state of one that is gone is dropped.

        Raises:
            ValueError: On every rank, for an exception on any, with the name of the callback.
        """

        def load() -> None:
            for name, callback in self._callbacks.items():
                if name in states and _overrides(callback, "load_state_dict"):
                    with named(f"{name}.load_state_dict"):
                        callback.load_state_dict(states[name])

        if self.wants("load_state_dict"):
            collective.on_all(load)


def _state(job: Job, metrics: Mapping[str, float]) -> RunState:
    return RunState(
        step=job.step,
        steps=job.cfg.train.steps,
        metrics=metrics,
        model=job.engine.unwrap(job.model),
        optimizer=job.optimizer,
        folder=job.folder,
        checkpoint=job.checkpoint,
        rank=job.accelerator.process_index,
        world=job.accelerator.num_processes,
    )


def _overrides(callback: Any, name: str) -> bool:
    """Whether a callback has a method of its own, beside those of `Callback`, which do nothing."""
    own = getattr(callback, name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(Callback, name)


def _check(name: str, callback: Any) -> None:
    for word in dir(type(callback)):
        near = difflib.get_close_matches(word, TIMES, n=1, cutoff=0.7)
        if near and word not in TIMES and callable(getattr(type(callback), word)):
            raise ValueError(f"{name}: nothing calls {word}: did you mean {near[0]}?")
    if not any(_overrides(callback, when) for when in TIMES):
        raise ValueError(f"{name} makes {type(callback).__name__}, which has none of {', '.join(TIMES)}")
    if _overrides(callback, "state_dict") != _overrides(callback, "load_state_dict"):
        raise ValueError(f"{name} has one of state_dict and load_state_dict: it needs both, or none")


def _numbers(returned: Any) -> dict[str, float]:
    """What a callback has returned, as numbers by name."""
    if returned is None:
        return {}
    if not isinstance(returned, Mapping) or not all(isinstance(key, str) for key in returned):
        raise ValueError(f"it must return numbers by name, or None, got {returned!r:.60}")
    return {key: float(value.detach() if isinstance(value, Tensor) else value) for key, value in returned.items()}
