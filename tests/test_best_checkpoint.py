"""The checkpoints of a run that stay beside the newest ones: the best one, and those of every so many steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distopt.checkpoint import verify
from distopt.models.export import export
from tests.harness.jobs import train
from tests.harness.runs import checkpoints, not_one_line

EVERY_2 = {"evaluation__every": "2", "checkpoint__every": "2", "train__steps": "8"}
BEST = {**EVERY_2, "checkpoint__best": "validation_loss", "checkpoint__keep": "1", "checkpoint__keep_every": "6"}


def scripted(losses: dict[int, float]) -> None:
    """Has the validation loss of a step as it is said."""
    from distopt.job import evaluate as program

    measure = program.Evaluation.measure

    def scripted_measure(evaluation: program.Evaluation) -> float:
        program.validation_loss = lambda *args: torch.tensor(losses.get(evaluation._job.step, 5.0))
        return measure(evaluation)

    program.Evaluation.measure = scripted_measure


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.matrix)])
def test_the_best_checkpoint_and_multiples_stay_and_a_resumed_run_goes_on_so(cwd: Path, asynchronous: str) -> None:
    run = cwd / "runs" / "b"
    changes = {**BEST, "name": "b", "checkpoint__asynchronous": asynchronous}
    train(cwd, 1, scripted, {2: 4.5, 4: 4.0, 6: 4.0}, **changes)
    assert checkpoints(run) == ["best", "step_00000004", "step_00000006", "step_00000008"]
    best = run / "checkpoints" / "best"
    assert best.readlink() == Path("step_00000004")
    assert json.loads((best / "manifest.json").read_text())["extra"]["validation_loss"] == 4.0
    verify(best)
    assert "exported from best" in export(best, cwd / "exported")
    train(cwd, 1, scripted, {10: 4.25, 12: 3.0, 14: 3.5}, **changes | {"train__steps": "14", "train__resume": "auto"})
    assert checkpoints(run) == ["best", "step_00000006", "step_00000012", "step_00000014"]
    assert best.readlink() == Path("step_00000012")


def test_a_best_checkpoint_needs_evaluations(cwd: Path) -> None:
    refused = {
        "checkpoint.best=validation_loss checkpoint.every=4": (
            "checkpoint.best=validation_loss needs an evaluation with every checkpoint",
            "checkpoint.every=4 must be a multiple of evaluation.every=6",
        ),
        "checkpoint.best=loss": ("checkpoint.best must be validation_loss or null, got 'loss'",),
        "checkpoint.keep_every=0": ("checkpoint.keep_every must be an integer >= 1 or null, got 0",),
    }
    assert not_one_line(cwd, refused) == {}
