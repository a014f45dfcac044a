"""Training runs: their folders, and the mathematics at several numbers of processes.

Every rank is a process of its own that runs the command line's `main` (`tests.harness.jobs`).
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.jobs import metrics, overrides, train
from tests.harness.runs import LONGER, OPTIMIZERS, checkpoints, copied, rows, steps

# Folders


def test_an_older_run_is_moved_aside(finished: Path, cwd: Path) -> None:
    done = copied(finished, cwd)
    old = rows(done)
    for number in (1, 2):
        out = train(cwd, **{**LONGER, "train__steps": str(number)})[0].out
        assert f"{done} contained an older run: moved to {done}-{number}" in out
        assert steps(done) == list(range(1, number + 1))
    assert rows(done.with_name("done-1")) == old
    assert checkpoints(done.with_name("done-1")) == ["step_00000004", "step_00000008"]
    assert steps(done.with_name("done-2")) == [1]


def test_a_refused_command_moves_nothing(finished: Path, cwd: Path) -> None:
    """The run was moved aside before the data were looked at, and was not found again by train.resume=auto."""
    done = copied(finished, cwd)
    words = ("train.sequence_length=65", "trackers=[nope]", "model.config.n_head=3")
    assert [ended.code for ended in jobs.one_after_another(cwd, [[*overrides(**LONGER), word] for word in words])] == [
        1
    ] * 3
    assert [path.name for path in done.parent.iterdir()] == ["done"]
    assert len(steps(done)) == 8


def test_another_runs_checkpoint_leaves_the_run_of_this_name_alone(finished: Path, cwd: Path) -> None:
    """Going on from another run's checkpoint is a new run: it wrote into, and pruned, the older run of its own name."""
    done = copied(finished, cwd)
    train(cwd, **{**LONGER, "name": "mine", "train__steps": "3"})
    start = done / "checkpoints" / "step_00000004"
    out = train(cwd, **{**LONGER, "name": "mine", "train__resume": str(start)})[0].out
    assert f"{cwd / 'runs' / 'mine'} contained an older run: moved to {cwd / 'runs' / 'mine-1'}" in out
    assert steps(cwd / "runs" / "mine-1") == [1, 2, 3]
    assert steps(cwd / "runs" / "mine") == [5, 6, 7, 8, 9, 10]
    assert rows(cwd / "runs" / "mine", after=4, losses_only=True)[:4] == rows(done, after=4, losses_only=True)


def test_what_is_no_run_is_left_alone(cwd: Path) -> None:
    """`name=..` once moved the folder aside in which the command was given."""
    thesis = cwd / "runs" / "thesis"
    thesis.mkdir(parents=True)
    (thesis / "chapter1.tex").write_text("In the beginning")
    (ended,) = jobs.run(cwd, overrides(name="thesis", train__steps="1", schedule__warmup_steps="0"))
    assert (ended.code, ended.err.strip().splitlines()[-1]) == (
        1,
        f"distopt: error: {thesis} contains something that is no run: choose another name",
    )
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis"]
    assert (thesis / "chapter1.tex").read_text() == "In the beginning"


# The mathematics


def test_the_loss_does_not_depend_on_the_number_of_processes(cwd: Path) -> None:
    curves = {}
    for world in (1, 4):
        train(cwd, world, name=f"w{world}", engine="fsdp2", optimizer="lamb", train__steps="8")
        curves[world] = rows(cwd / "runs" / f"w{world}")
    for name in ("loss", "validation_loss", "grad_norm"):
        one, four = ([row[name] for row in curve if name in row] for curve in curves.values())
        assert four == pytest.approx(one, abs=1e-4)
    losses = [row["loss"] for row in curves[1] if "loss" in row]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.matrix
def test_micro_batches_and_precision_are_the_same_step(cwd: Path) -> None:
    """Accumulated gradients are those of the whole batch; bf16 is near, and is not the same."""
    runs = {
        "whole": {},
        "micro": {"train__micro_batch_size": "1"},
        "zero2": {"engine": "zero2", "train__micro_batch_size": "2"},
        "bf16": {"engine__precision": "bf16"},
        "checkpointing": {"engine": "fsdp2", "engine__activation_checkpointing": "true"},
    }
    losses = {}
    for name, changes in runs.items():
        train(cwd, 2, name=name, train__steps="4", **changes)
        losses[name] = [row["loss"] for row in rows(cwd / "runs" / name, losses_only=True)]
    for name in ("micro", "zero2", "checkpointing"):
        assert losses[name] == pytest.approx(losses["whole"], abs=1e-5)
    assert losses["bf16"] == pytest.approx(losses["whole"], abs=0.05)
    assert losses["bf16"] != losses["whole"]


class Sweep(NamedTuple):
    folder: Path
    choices: list[str]
    ended: jobs.Ended


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Sweep:
    """One command that trains with the optimizers of the selected tests in turn, on the text that every machine has."""
    items = [item for item in request.session.items if "sweep" in getattr(item, "fixturenames", ())]
    choices = [item.callspec.params["choice"] for item in items if hasattr(item, "callspec")] or OPTIMIZERS[:1]
    folder = tmp_path_factory.mktemp("sweep")
    changes: dict[str, str | None] = {
        "data": "stdlib",
        "data__path": None,
        "data__validation_fraction": None,
        "train__steps": "20",
        "train__sequence_length": "32",
        "schedule__warmup_steps": "3",
        "evaluation__every": "20",
        "evaluation__max_sequences": "32",
        "evaluation__sample_tokens": "0",
        "checkpoint__every": "20",
        "model__config__n_embd": "32",
    }
    (ended,) = jobs.run(folder, ["-m", *overrides(**changes), f"optimizer={','.join(choices)}"])
    assert ended.code == 0, ended.err
    return Sweep(folder, choices, ended)


# Those that estimate their rate start from a millionth of it, and the sign's rate is small: 20 steps are few.
SLOW = {"dadapt_adam": 0.08, "dadapt_sgd": 0.0, "lion": 0.15, "prodigy": 0.02}
QUICK = ("momentum", "adamw", "lamb", "lars", "prodigy", "sgd_schedule_free")


# MeZO takes no gradients, and train.max_grad_norm=null: tests/test_mezo_job.py trains by it.
@pytest.mark.parametrize("choice", some(QUICK, [choice for choice in OPTIMIZERS if choice != "mezo"]))
def test_every_optimizer_learns(sweep: Sweep, choice: str) -> None:
    run = sweep.folder / "runs" / "train" / str(sweep.choices.index(choice))
    before, after = (row["validation_loss"] for row in metrics(run) if "validation_loss" in row)
    assert before == pytest.approx(math.log(256), abs=0.2)  # untrained: all bytes are alike
    assert after < before - SLOW.get(choice, 0.25)
    assert len(steps(run)) == 20 and metrics(run)[-1]["step"] == 20


def test_a_job_of_a_sweep_says_how_to_resume_it(sweep: Sweep) -> None:
    """Without its folder in the command, every job of a sweep would have resumed in runs/train."""
    folder, choices, ended = sweep
    commands = [shlex.split(command) for command in re.findall("^resume:(.*)$", ended.out, re.MULTILINE)]
    assert len(commands) == len(choices)
    words = [*commands[-1][commands[-1].index("train") + 1 :], "train.steps=21"]
    (again,) = jobs.run(folder, words)
    last = folder / "runs" / "train" / str(len(choices) - 1)
    assert again.code == 0, again.err
    assert f"resuming after step 20 from {last / 'checkpoints' / 'step_00000020'}" in again.out
    assert steps(last) == list(range(1, 22))


def ascii_terminal() -> None:
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]


def test_a_sample_is_shown_on_any_terminal(cwd: Path) -> None:
    """A run ended with an error, after all its steps, where the terminal had no character for what was sampled."""
    changes = {"train__steps": "1", "schedule__warmup_steps": "0", "evaluation__sample_tokens": "4"}
    for before, shown in ((ascii_terminal, r"caf\xe9 \ufffd[2J"), (None, "café \ufffd[2J")):
        (ended,) = train(cwd, 1, before, evaluation__prompt='"café \x1b[2J"', **changes)
        assert f"prompt:          {shown}" in ended.out and "curves: " in ended.out
