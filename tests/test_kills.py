"""Jobs that are killed at any moment, again and again, end as the unbroken one."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from distopt.checkpoint import checkpoint_path, intact_checkpoint
from tests.harness import jobs
from tests.harness.jobs import overrides
from tests.harness.runs import DROPOUT, last_step, losses

KILLS = int(os.environ.get("DISTOPT_KILLS", "20"))  # of each kind of job
LONG = {"checkpoint__every": "2", "evaluation__every": "1000", "schedule": "constant", "schedule__warmup_steps": "0"}


def killed(cwd: Path, words: list[str], draw: random.Random, until_step: int) -> int:
    """One life of a job, which ends by SIGKILL to one rank or to all of them; how many ranks were alive then.

    The moment is drawn after a step that is drawn too, so it may be in a step, in a save, or while old checkpoints go.
    """
    run = cwd / "runs" / "killed"
    job = jobs.start(cwd, words, 2)
    deadline = time.monotonic() + 100 * jobs.PATIENCE
    while last_step(run) < until_step and all(process.is_alive() for process in job.processes):
        assert time.monotonic() < deadline, "the job does not move"
        time.sleep(0.001)
    time.sleep(draw.random() * 0.1)
    alive = [process for process in job.processes if process.is_alive()]
    for process in draw.choice([alive, alive[:1], alive[1:]]) or alive:
        process.kill()
    job.wait(100)
    return len(alive)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("engine", "asynchronous"),
    [("zero1", False), ("zero1", True), ("fsdp2", True), ("hsdp", False), ("deepspeed_zero2", False)],
)
def test_a_job_that_is_killed_at_any_moment_ends_as_the_unbroken_one(
    cwd: Path, engine: str, asynchronous: bool
) -> None:
    """Every life finds a whole checkpoint that no later step is missing from, and no life is lost."""
    draw = random.Random(f"{engine} {asynchronous}")
    shared = {**LONG, **DROPOUT, "engine": engine, "checkpoint__asynchronous": str(asynchronous).lower()}
    words = overrides(name="killed", train__resume="auto", train__steps="100000", **shared)
    run, reached = cwd / "runs" / "killed", 0
    for kill in range(KILLS):
        assert killed(cwd, words, draw, reached + draw.randrange(1, 5)) == 2, "a job ended by itself"
        newest, broken = intact_checkpoint(run / "checkpoints")
        assert broken == [], (kill, broken)
        found = step_of(newest) if newest else 0
        assert found >= reached, (kill, found, reached)  # nothing that was whole is lost
        reached = found
    steps = str(reached + 3)
    jobs.train(cwd, 2, None, name="killed", train__resume="auto", train__steps=steps, **shared)
    jobs.train(cwd, 2, None, name="unbroken", train__steps=steps, **shared)
    assert losses(run) == losses(cwd / "runs" / "unbroken")
    ends = (checkpoint_path(cwd / "runs" / name / "checkpoints", int(steps)) for name in ("killed", "unbroken"))
    first, second = (json.loads((end / "manifest.json").read_text())["fingerprint"] for end in ends)
    assert first == second
    print(f"{engine}, asynchronous={asynchronous}: {KILLS} of {KILLS} kills, {steps} steps")
