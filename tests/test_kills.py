"""Jobs that are killed at any moment, again and again: nothing is lost, and they end as the unbroken one."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from distopt.checkpoint import checkpoint_path, intact_checkpoint
from distopt.checkpoint.folder import newest_first, problem, step_of
from distopt.checkpoint.storage import storage
from tests.harness import jobs
from tests.harness.agent import Launched
from tests.harness.jobs import overrides
from tests.harness.runs import DROPOUT, last_step, losses, until

KILLS = int(os.environ.get("DISTOPT_KILLS", "20"))  # of each kind of job
RESTARTS = 10
WAIT = 60.0  # seconds on a quiet machine, for a start and a few steps, or for an end; torchrun gives a rank 30 to end
LONG = {"checkpoint__every": "2", "evaluation__every": "1000", "schedule": "constant", "schedule__warmup_steps": "0"}
VICTIMS = {
    "rank 0": (False, 0),
    "rank 1": (False, 1),
    "both ranks": (False, 0, 1),
    "the launcher": (True,),
    "the launcher and rank 0": (True, 0),
    "the launcher and rank 1": (True, 1),
    "all": (True, 0, 1),
}
MOMENTS = ("while it starts", "in a step", "in a save", "in a save")


class Found(NamedTuple):
    """The folder of checkpoints at a moment: the step of the newest complete one, and what is not complete."""

    step: int
    unfinished: tuple[str, ...]


def found(run: Path) -> Found:
    folder, unfinished = run / "checkpoints", []
    for name in newest_first(folder):
        if problem(storage(folder / name)) is None:
            return Found(step_of(name) or 0, tuple(unfinished))
        unfinished.append(name)
    return Found(0, tuple(unfinished))


def opened(run: Path) -> int:
    """A number that a job changes when it has opened its run: it writes the metrics anew that it continues."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return 0


def wait_for(job: Launched, run: Path, moment: str, draw: random.Random) -> bool:
    """Waits for the moment of a kill; returns whether the job has taken a step by then."""
    before, begun, steps = opened(run), found(run), draw.randrange(1, 6)
    deadline = time.monotonic() + WAIT * jobs.PATIENCE
    if moment == "while it starts":
        while len(job.ranks()) < 2:
            assert time.monotonic() < deadline and job.process.is_alive(), job.told()
            time.sleep(0.001)
        time.sleep(draw.random() * 2.0)
        return False
    while opened(run) == before or last_step(run) < begun.step + steps:
        assert time.monotonic() < deadline and job.process.is_alive(), job.told()
        time.sleep(0.005)
    if moment == "in a save":
        seen = set(newest_first(run / "checkpoints"))
        while seen >= set(newest_first(run / "checkpoints")):
            assert time.monotonic() < deadline and job.process.is_alive(), job.told()
        time.sleep(draw.random() * 0.01)
    else:
        time.sleep(draw.random() * 0.1)
    return True


def killed(cwd: Path, words: list[str], victims: str, moment: str, draw: random.Random) -> tuple[Found, Found, float]:
    """One life of a job; returns what was there just before its kill, what was left, and the seconds until its end."""
    run = cwd / "runs" / "killed"
    job = Launched(cwd, words)
    try:
        trains = wait_for(job, run, moment, draw)
        before = found(run)
        job.strike(*VICTIMS[victims])
        began = time.monotonic()
        assert job.wait(WAIT) != 0, job.told()
        seconds = time.monotonic() - began
    finally:
        job.kill()
    after = found(run)
    if trains and victims == "the launcher":
        assert after == Found(last_step(run), ()), job.told()  # its ranks have saved what they had
    return before, after, seconds


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("engine", "asynchronous"),
    [("zero1", False), ("zero1", True), ("fsdp2", False), ("fsdp2", True), ("deepspeed_zero2", False)],
)
def test_a_job_that_is_killed_at_any_moment_ends_as_the_unbroken_one(
    cwd: Path, engine: str, asynchronous: bool
) -> None:
    """Every life finds the newest checkpoint that the one before had, whole."""
    draw = random.Random(f"{engine} {asynchronous}")
    shared = {**LONG, **DROPOUT, "engine": engine, "checkpoint__asynchronous": str(asynchronous).lower()}
    words = overrides(name="killed", train__resume="auto", train__steps="100000", **shared)
    run, half_written, slowest = cwd / "runs" / "killed", 0, 0.0
    for kill in range(KILLS):
        victims, moment = draw.choice([*VICTIMS]), MOMENTS[kill % len(MOMENTS)]
        before, after, seconds = killed(cwd, words, victims, moment, draw)
        assert after.step >= before.step, (kill, victims, moment, before, after)
        half_written += bool(after.unfinished)
        slowest = max(slowest, seconds)
        newest, broken = intact_checkpoint(run / "checkpoints")
        assert (newest.name if newest else None) == (checkpoint_path("", after.step).name if after.step else None)
        assert all("was not written to its end" in line for line in broken), (kill, broken)
    steps = found(run).step + 3
    for name in ("killed", "unbroken"):
        jobs.train(cwd, 2, None, name=name, train__resume="auto", train__steps=str(steps), **shared)
    assert [step for step, *_ in losses(run)] == list(range(1, steps + 1))
    assert losses(run) == losses(cwd / "runs" / "unbroken")
    ends = (checkpoint_path(cwd / "runs" / name / "checkpoints", steps) for name in ("killed", "unbroken"))
    first, second = (json.loads((end / "manifest.json").read_text())["fingerprint"] for end in ends)
    assert first == second
    how = f"{engine}, {'asynchronous' if asynchronous else 'synchronous'} checkpoints"
    print(
        f"{how}: {KILLS} kills of {KILLS} resumed, {half_written} of which left a half-written folder; every process "
        f"ended within {slowest:.1f} s; all {steps} steps equal"
    )


@pytest.mark.matrix
@pytest.mark.timeout(0)
def test_one_launch_outlives_ten_deaths(cwd: Path) -> None:
    """Its launcher starts it again each time, and each time it resumes, although train.resume is `never`."""
    draw, options = random.Random(0), {**LONG, **DROPOUT, "engine": "fsdp2", "train__steps": "150"}
    run = cwd / "runs" / "restarted"
    job = Launched(cwd, overrides(name="restarted", train__resume="never", **options), restarts=RESTARTS)
    try:
        for _ in range(RESTARTS):
            wait_for(job, run, "in a step", draw)
            job.strike(False, draw.randrange(2))
        until(lambda: last_step(run) == 150 and not job.ranks(), job.process.is_alive, 2 * WAIT)
    finally:
        job.kill()
    assert len([*job.logs.glob("*-0.log")]) == RESTARTS + 1
    jobs.train(cwd, 2, None, name="unbroken", **options)
    assert losses(run) == losses(cwd / "runs" / "unbroken")
    assert {path.name for path in (cwd / "runs").iterdir()} == {"restarted", "unbroken"}  # nothing was moved aside
    print(f"fsdp2: {RESTARTS} restarts of {RESTARTS} in one launch")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("engine", "asynchronous"), [("zero1", False), ("zero1", True), ("fsdp2", True), ("deepspeed_zero2", True)]
)
def test_ranks_whose_launcher_dies_before_their_first_save_do_save(cwd: Path, engine: str, asynchronous: bool) -> None:
    """The store in which they would have met for it, to write in the background, is the launcher's, and is gone."""
    options = {**LONG, "engine": engine, "checkpoint__every": "100000", "train__steps": "100000"}
    words = overrides(name="one", checkpoint__asynchronous=str(asynchronous).lower(), **options)
    job, run = Launched(cwd, words), cwd / "runs" / "one"
    try:
        until(lambda: last_step(run) > 2, job.process.is_alive, WAIT)
        job.strike(True)
        job.wait(WAIT)
    finally:
        job.kill()
    assert found(run) == Found(last_step(run), ()), job.told()
