"""Experiment trackers over interruptions: one run for each of them, and no step twice."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness import jobs
from tests.harness.faults import die_in_forward, spike
from tests.harness.jobs import metrics

RUN = {"trackers": "[tensorboard,wandb]", "train__steps": "14", "evaluation__every": "5", "checkpoint__every": "4"}


def fake_wandb(folder: str, dies: int = 0) -> None:
    """A module that writes what Accelerate's tracker tells it: what a run needs of W&B, without its servers.

    It fails for what W&B drops. The arguments of `init` are some of those of wandb 0.31.
    dies: the forward pass in which the process is killed.
    """
    from accelerate import tracking

    def write(kind: str, *values: Any) -> None:
        with (Path(folder) / f"wandb-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps([kind, *values]) + "\n")

    def init(
        project: str,
        id: str | None = None,
        name: str | None = None,
        group: str | None = None,
        resume: str | None = None,
    ) -> SimpleNamespace:
        write("init", {"project": project, "id": id, "name": name, "group": group, "resume": resume})
        return run

    def log(values: dict[str, Any], step: int) -> None:
        assert step >= run.step, f"W&B drops step {step} after step {run.step}"
        run.step = step
        write("log", step, {name: value for name, value in values.items() if isinstance(value, (int, float))})

    run = SimpleNamespace(step=0, log=log, finish=lambda: write("finish"))
    module: Any = ModuleType("wandb")
    module.init, module.Histogram = init, list
    module.config = SimpleNamespace(update=lambda values, allow_val_change: write("config", values))
    sys.modules["wandb"] = module
    tracking._available_trackers.append(tracking.LoggerType.WANDB)
    if dies:
        die_in_forward(dies, rank=0)


def told(cwd: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (cwd / "wandb-0.jsonl").read_text().splitlines()]


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the steps and values of each scalar."""
    events = EventAccumulator(str(run / "logs" / "distopt"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_new_run_tells_its_configuration_and_its_metrics(tmp_path: Path) -> None:
    """By its first process alone."""
    jobs.write_text(tmp_path)
    changes = {"trackers": "[wandb]", "train__steps": "3", "schedule__warmup_steps": "0", "evaluation__every": "2"}
    jobs.train(tmp_path, 2, fake_wandb, str(tmp_path), name="tracked", **changes)
    assert not (tmp_path / "wandb-1.jsonl").exists()
    (_, options), (_, config), *rest = told(tmp_path)
    assert options == {"project": "distopt", "id": options["id"], "name": "tracked", "group": None, "resume": "allow"}
    assert [kind for kind, *_ in rest] == [*["log"] * (len(rest) - 1), "finish"]
    for name, value in {"train.steps": 3, "optimizer.lr": 2e-3, "optimizer.betas": "[0.9, 0.95]", "seed": 0}.items():
        assert config[name] == value
    logged = [{"step": step, **values} for _, step, values in rest[:-1]]
    assert logged == metrics(tmp_path / "runs" / "tracked")
    assert [row["step"] for row in logged if "validation_loss" in row] == [0, 2, 3]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its 11th step, resumed from step 8, killed in step 10, and resumed from step 8 again."""
    cwd = tmp_path_factory.mktemp("resumed")
    jobs.write_text(cwd)
    for dies in (11, 2):
        (ended,) = jobs.run(cwd, jobs.overrides(name="r", train__resume="auto", **RUN), 1, fake_wandb, str(cwd), dies)
        assert ended.code == -9, ended.err
    jobs.train(cwd, 1, fake_wandb, str(cwd), name="r", train__resume="auto", **RUN)
    return cwd


def test_a_resumed_run_is_one_run_of_wandb(resumed: Path) -> None:
    """Steps that the dead process has told are not told again; those of the second death neither."""
    lines = told(resumed)
    ids = [line[1]["id"] for line in lines if line[0] == "init"]
    assert len(ids) == 3 and len({*ids}) == 1 and len(ids[0]) == 21
    rows = [{"step": line[1], **line[2]} for line in lines if line[0] == "log"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 15))
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 5, 10, 14]
    losses = {row["step"]: row["loss"] for row in metrics(resumed / "runs/r") if "loss" in row}
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == losses


def test_a_resumed_run_is_one_log_of_tensorboard(resumed: Path) -> None:
    """It has the rows of metrics.jsonl; the hyper-parameters are those of one run."""
    run = resumed / "runs/r"
    shown = board(run)
    for name in ("loss", "validation_loss", "lr"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics(run) if name in row]
        assert shown[name] == expected
    assert [step for step, _ in shown["loss"]] == list(range(1, 15))
    assert len(list((run / "logs").rglob("hparams.yml"))) == 1


def test_a_run_that_is_rolled_back_shows_what_it_did_then(tmp_path: Path) -> None:
    """TensorBoard forgets the steps after the one that the run went back to, but not the alarm."""
    jobs.write_text(tmp_path)
    watched = {"health": "on", "health__warmup": "3", "health__copy_every": "3", "health__action": "rollback"}
    changes = {**watched, "evaluation__every": "4", "trackers": "[tensorboard]"}
    jobs.train(tmp_path, 1, spike, 8, name="r", **changes)
    shown = board(tmp_path / "runs/r")
    rows = {row["step"]: row["loss"] for row in metrics(tmp_path / "runs/r") if "loss" in row}
    assert shown["loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in rows.items()]
    assert [step for step, _ in shown["health/alarm"]] == [8]


def test_norms_that_are_known_late_belong_to_the_step_that_is_logged(tmp_path: Path) -> None:
    """W&B dropped them, with a warning for each."""
    jobs.write_text(tmp_path)
    changes = {"trackers": "[wandb]", "health": "on", "train__steps": "3", "evaluation__every": "3"}
    jobs.train(tmp_path, 1, fake_wandb, str(tmp_path), name="h", **changes)
    logged = [(line[1], line[2]) for line in told(tmp_path) if line[0] == "log"]
    assert [step for step, values in logged if not values] == [3] * 4


def test_the_jobs_of_a_sweep_are_a_group(tmp_path: Path) -> None:
    """Also when one of them is resumed by the command that it has printed, outside of the sweep."""
    jobs.write_text(tmp_path)
    job = ["hydra.job.num=3", "hydra.sweep.dir='runs/a $grid'", "hydra.run.dir='runs/a $grid/3'"]
    words = jobs.overrides(name="a", trackers="[wandb]", train__steps="2", schedule__warmup_steps="0")
    (ended,) = jobs.run(tmp_path, [*words, *job], 1, fake_wandb, str(tmp_path))
    assert ended.code == 0, ended.err
    more = jobs.overrides(name="a", trackers="[wandb]", train__steps="3", schedule__warmup_steps="0")
    again = [*more, "train.resume=auto", *job[2:]]
    (ended,) = jobs.run(tmp_path, again, 1, fake_wandb, str(tmp_path))
    assert ended.code == 0, ended.err
    first, second = [line[1] for line in told(tmp_path) if line[0] == "init"]
    assert first == second and (first["name"], first["group"]) == ("a $grid/3", "a $grid")
    assert [line[1] for line in told(tmp_path) if line[0] == "log"] == [0, 1, 2, 2, 3, 3]
