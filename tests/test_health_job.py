"""Gradient health in a training job: files, the log, the report, rollbacks, resuming, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distopt.report.page import write_report
from tests.harness import jobs
from tests.harness.faults import SPIKED as WEIGHT
from tests.harness.faults import spike
from tests.harness.jobs import metrics, overrides, train
from tests.harness.runs import rows

WATCHED = {"health": "on", "train__steps": "12", "evaluation__every": "4", "health__warmup": "3"}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.parametrize(
    ("engine", "world", "action"),
    [
        ("ddp", 1, "rollback"),
        pytest.param("fsdp2", 2, "rollback", marks=pytest.mark.matrix),
        ("zero1", 2, "reload"),
    ],
    ids=str,
)
def test_a_run_rolls_back_with_its_schedule_and_passes_over_the_batches(
    cwd: Path, engine: str, world: int, action: str
) -> None:
    """A spike in the 8th step: back to step 6 or to the checkpoint of step 4, and on with the 9th batch."""
    changes = {**WATCHED, "health__copy_every": "3", "health__action": action, "checkpoint__every": "4"}
    ended = train(cwd, world, spike, 8, name="r", engine=engine, **changes)
    run = cwd / "runs" / "r"
    to = 6 if action == "rollback" else 4
    (alarm,) = lines(run / "alarms.jsonl")
    assert (alarm["step"], alarm["kind"], alarm["layer"]) == (8, "spike of the gradient", WEIGHT)
    assert f"health: rolled back to step {to}; {8 - to} batches are passed over" in ended[0].out
    training = rows(run, losses_only=True)
    assert [row["step"] for row in training] == list(range(1, 13))
    assert training[-1]["lr"] < training[6]["lr"]  # the schedule ends where it should
    assert training[-1]["skipped"] == 1
    layers = lines(run / "layers.jsonl")
    assert [row["step"] for row in layers] == [3, 7, 11]  # norms of updates are known one step late
    assert {*layers[0]} == {"step", "grad_norm", "weight_norm", "update_norm", "update_to_weight"}
    page = write_report(run, cwd / "report").read_text()
    assert "<h2>Alarms</h2>" in page and WEIGHT in page
    assert "Norm of the update of each parameter" in page
    state = json.loads((next((run / "checkpoints").glob("step_*12")) / "manifest.json").read_text())["extra"]
    assert state["passed_over"] == 8 - to


def test_a_resumed_run_is_the_unbroken_one(cwd: Path) -> None:
    """Its statistics are in the checkpoint: the spike after it is clipped to the same bound."""
    changes = {**WATCHED, "health__action": "clip", "optimizer": "lamb", "schedule": "warmup_constant"}
    train(cwd, 1, spike, 8, name="a", **changes)
    train(cwd, 1, None, name="b", **{**changes, "train__steps": "4"})
    train(cwd, 1, spike, 4, name="b", train__resume="auto", **changes)
    whole, resumed = (rows(cwd / "runs" / name, losses_only=True) for name in "ab")
    alarms = [lines(cwd / "runs" / name / "alarms.jsonl") for name in "ab"]
    assert [alarm["kind"] for alarm in alarms[0]] == ["spike of the gradient"]
    assert alarms[1] == alarms[0]
    assert [row["loss"] for row in resumed][4:8] == [row["loss"] for row in whole][4:8]
    assert metrics(cwd / "runs" / "a")


REFUSED = {
    "health=on engine=deepspeed_zero2": "health: a run under DeepSpeed, which hides gradients .*engine=zero1 or fsdp2, "
    "or health=off",
    "health=on health.action=stop": "health.action must be one of warn, clip, skip, rollback, reload, got 'stop'",
    "health=on health.threshold=0": "health.threshold must be a number > 0, got 0",
    "health=on health.copies=3": "there is no health.copies: did you mean copy_every",
    "health=on +optimizer.capturable=true": "health: capturable=True: a CUDA graph cannot report norms",
}


def test_what_cannot_be_watched_is_refused_in_one_line(cwd: Path) -> None:
    import re

    commands = [[*overrides(), *words.split()] for words in REFUSED]
    for ended, message in zip(jobs.one_after_another(cwd, commands), REFUSED.values()):
        assert ended.code == 1
        assert re.search(rf"^distopt: error: {message}", ended.err, re.MULTILINE), ended.err
