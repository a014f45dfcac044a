"""Callbacks of a run: when they are called and with what, their numbers and their state, errors; early stopping."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from distopt.job.callbacks import Callbacks
from distopt.job.early_stopping import EarlyStopping
from distopt.job.protocols import Callback, RunState
from distopt.report.runs import Run
from tests.harness import jobs
from tests.harness.runs import checkpoints, not_one_line
from tests.test_best_checkpoint import BEST, scripted

WATCH = """
import json, os

class Watch:
    def __init__(self, fails_at=None, stops_at=None): self.fails_at, self.stops_at, self.calls = fails_at, stops_at, 0
    def after_step(self, run):
        if (run.rank, run.step) == (1, self.fails_at): raise KeyError("mine")
        if (run.rank, run.step) == (1, self.stops_at): run.stop("enough")
        return {"rank": run.rank, "grown": run.metrics["loss"] + 1} if run.rank or run.step < 3 else None
    def after_evaluation(self, run):
        self.calls += 1
        return {"evaluations": self.calls}
    def after_checkpoint(self, run):
        assert (run.checkpoint / "manifest.json").is_file()
        return {"saved": int(run.checkpoint.name[5:])}
    def state_dict(self): return {"calls": self.calls}
    def load_state_dict(self, state): self.calls = state["calls"]
"""
OWN = "[{_target_: watch.Watch}]"


def find_modules(then: Callable[..., None] | None = None, *args: Any) -> None:
    sys.path.insert(0, "")  # as `python -m` does
    if then:
        then(*args)


@pytest.fixture
def own(cwd: Path) -> Path:
    (cwd / "watch.py").write_text(WATCH)
    return cwd


def test_a_run_ends_when_its_loss_no_longer_improves_and_goes_on_with_more_patience(own: Path) -> None:
    run = own / "runs" / "e"
    words = {
        **BEST,
        "name": "e",
        "train__steps": "20",
        "callbacks": OWN,
        "early_stopping": "on",
        "early_stopping__patience": "2",
        "checkpoint__asynchronous": "true",
    }
    losses = {2: 4.5, 4: 4.0, 6: 4.0, 8: 4.2}
    (ended,) = jobs.train(own, 1, find_modules, scripted, losses, **words)
    assert checkpoints(run) == ["best", "step_00000004", "step_00000006", "step_00000008"]
    assert (run / "checkpoints" / "best").readlink() == Path("step_00000004")
    reason = "validation_loss has not improved in 2 evaluations: the best was 4 at step 4"
    assert f"stopped early:   after step 8 of 20: {reason}" in ended.out
    assert "early_stopping.patience=4" in ended.out
    read = Run.read(run, "e")
    assert (read.stopped_early, read.unfinished, read.steps) == (reason, False, 8)
    rows = jobs.metrics(run)
    assert [row["evaluations"] for row in rows if "validation_loss" in row] == [1, 2, 3, 4, 5]
    assert [(row["step"], row["saved"]) for row in rows if "saved" in row] == [(4, 2), (6, 4), (8, 6), (8, 8)]
    assert all(row["grown"] == row["loss"] + 1 for row in rows if row["step"] < 3 and "loss" in row)

    (ended,) = jobs.train(own, 1, find_modules, scripted, losses, **words, train__resume="auto")
    assert "stopped early:   after step 8 of 20" in ended.out and Run.read(run, "e").steps == 8
    changes = {"train__resume": "auto", "early_stopping__patience": "3", "train__steps": "12"}
    jobs.train(own, 1, find_modules, scripted, {**losses, 10: 3.0, 12: 3.5}, **words | changes)
    read = Run.read(run, "e")
    assert (read.stopped_early, read.unfinished, read.steps) == ("", False, 12)
    evaluations = {row["step"]: row["evaluations"] for row in jobs.metrics(run) if "validation_loss" in row}
    assert evaluations == {0: 1, 2: 2, 4: 3, 6: 4, 8: 6, 10: 7, 12: 8}  # a resumed run evaluates its checkpoint again


def test_an_exception_of_one_rank_ends_all_in_a_line_and_numbers_are_means(own: Path) -> None:
    words = jobs.overrides(name="f", callbacks="[{_target_: watch.Watch, fails_at: 4}]", engine="fsdp2")
    ended = jobs.run(own, words, 2, find_modules)
    assert [rank.code for rank in ended] == [1, 1]
    for rank in ended:
        (line,) = rank.err.strip().splitlines()
        assert line.endswith("error: watch.Watch.after_step on rank 1: KeyError: 'mine'")
    assert [row["rank"] for row in jobs.metrics(own / "runs" / "f") if "rank" in row] == [0.5, 0.5, 1.0]


def test_one_rank_stops_all_with_an_evaluation_and_a_checkpoint_at_that_step(own: Path) -> None:
    ended = jobs.train(own, 2, find_modules, name="s", callbacks="[{_target_: watch.Watch, stops_at: 3}]")
    assert "stopped early:   after step 3 of 12: enough" in ended[0].out and "patience" not in ended[0].out
    rows = jobs.metrics(own / "runs" / "s")
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3]
    assert checkpoints(own / "runs" / "s") == ["step_00000003"]


def test_what_is_no_callback_is_refused(own: Path) -> None:
    (own / "odd.py").write_text(
        "class Empty: pass\n"
        "class Misspelt:\n    def after_eval(self, run): pass\n"
        "class Half:\n    def after_step(self, run): pass\n    def state_dict(self): return {}\n"
    )
    sys.path.insert(0, str(own))
    refused = {
        "callbacks=[{_target_:nowhere.Watch}]": ("callbacks[0], nowhere.Watch: ", "nowhere"),
        "callbacks=[{_target_:collections.OrderedDict}]": ("which has none of after_step",),
        "callbacks=[{minutes:3}]": ("callbacks must be a list of entries with _target_",),
        "callbacks=3": ("callbacks must be a list",),
        "early_stopping=on early_stopping.patience=0": ("early_stopping.patience must be an integer >= 1, got 0",),
        "early_stopping=on early_stopping.mode=least": ("early_stopping.mode must be one of min, max, got 'least'",),
        "early_stopping=on early_stopping.patience=1 early_stopping.delta=1": ("early_stopping", "delta"),
    }
    assert not_one_line(own, refused) == {}
    import importlib

    odd = importlib.import_module("odd")
    for kind, words in {
        "Empty": "makes Empty, which has none of after_step, after_evaluation, after_checkpoint",
        "Misspelt": "nothing calls after_eval: did you mean after_evaluation",
        "Half": "has one of state_dict and load_state_dict",
    }.items():
        with pytest.raises(ValueError, match=words):
            Callbacks({"odd": getattr(odd, kind)()})
    sys.path.remove(str(own))


class Job:
    """What `Callbacks` reads of a job."""

    def __init__(self, step: int) -> None:
        self.step, self.folder, self.checkpoint = step, Path(), None
        self.model, self.optimizer = nn.Linear(1, 1), None
        self.cfg = type("Cfg", (), {"train": type("Train", (), {"steps": 100})})
        self.engine = type("Engine", (), {"unwrap": lambda self, model: model})()
        self.accelerator = type("Accelerator", (), {"process_index": 0, "num_processes": 1})


def called(callback: Any, step: int, **metrics: float) -> tuple[dict[str, float], str | None]:
    callbacks = Callbacks({"mine": callback})
    return callbacks.call("after_evaluation", Job(step), metrics), callbacks.stopped  # type: ignore[arg-type]


class Returns(Callback):
    """One that derives from the protocol, whose other methods are therefore not called."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def after_evaluation(self, run: RunState) -> Any:
        return self.returned


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (3.0, "must return numbers by name, or None, got 3.0"),
        ({"validation_loss": 1.0}, "'validation_loss', which the row has already"),
        ({"step": 1.0}, "'step', which the row has already"),
        ({"a": "b"}, "could not convert"),
        ({1: 1.0}, "must return numbers by name"),
    ],
)
def test_other_returns_are_refused(returned: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        called(Returns(returned), 1, validation_loss=2.0)
    assert str(refused.value).startswith("mine.after_evaluation: ")


def test_a_derived_callback_is_called_for_its_own_methods_alone() -> None:
    callbacks = Callbacks({"mine": Returns(None)})
    assert [callbacks.wants(name) for name in ("after_step", "after_evaluation", "state_dict")] == [False, True, False]
    assert called(Returns({"a": torch.ones((), requires_grad=True)}), 1) == ({"a": 1.0}, None)
    assert callbacks.state_dict() == {}


def run_state(step: int, **metrics: float) -> RunState:
    model = nn.Linear(1, 1)
    stepper = optim.SGD(model.parameters())
    return RunState(
        step=step,
        steps=9,
        metrics=metrics,
        model=model,
        optimizer=stepper,
        folder=Path(),
        checkpoint=None,
        rank=0,
        world=1,
    )


STORIES: dict[str, tuple[dict[str, Any], list[float], int | None]] = {
    # options, the metric at steps 0, 1, ..., and the step after which the run ends
    "no improvement": ({"patience": 2}, [3.0, 2.0, 2.0, 2.5], 3),
    "in a row": ({"patience": 2}, [3.0, 3.5, 2.0, 2.1, 1.9, 2.0], None),
    "a small improvement is none": ({"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.5], 2),
    "small ones add up": ({"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.4, 2.0], None),
    "not finite": ({"patience": 2}, [3.0, math.nan, math.inf], 2),
    "never finite": ({"patience": 2}, [math.nan, math.nan], 1),
    "a metric that rises": ({"patience": 1, "mode": "max"}, [0.1, 0.2, 0.2], 2),
}


@pytest.mark.parametrize(("options", "values", "end"), STORIES.values(), ids=STORIES)
def test_early_stopping_counts(options: dict[str, Any], values: list[float], end: int | None) -> None:
    """As Lightning and the Trainer of transformers do; also if each evaluation is by a process of its own."""
    stopping, ended = EarlyStopping("m", **options), None
    for step, value in enumerate(values):
        state = json.loads(json.dumps(stopping.state_dict()))
        stopping = EarlyStopping("m", **options)
        stopping.load_state_dict(state)
        for _ in range(2):  # a resumed run evaluates its checkpoint again
            run = run_state(step, m=value)
            stopping.after_evaluation(run)
        if run._reasons:
            ended = step
            break
    assert ended == end


def test_early_stopping_names_the_metrics_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"early_stopping\.metric=loss: an evaluation has validation_loss, mine"):
        EarlyStopping("loss").after_evaluation(run_state(1, validation_loss=1.0, mine=2.0))
    sometimes = EarlyStopping("a", patience=1)  # not measured at every evaluation
    for step, metrics in enumerate(({"a": 1.0}, {}, {}, {"a": 0.5})):
        run = run_state(step, **metrics)
        sometimes.after_evaluation(run)
        assert not run._reasons
    state = EarlyStopping("a").state_dict() | {"best": 1.0}
    other = EarlyStopping("b")
    other.load_state_dict(state)
    assert other.state_dict()["best"] is None
