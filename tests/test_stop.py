"""A run that gets a signal finishes its step, saves, exits with a code of its own, and resumes bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distopt.job.stop import SIGNALS, STOPPED
from tests.harness import jobs
from tests.harness.jobs import overrides
from tests.harness.runs import last_step, losses, until

# Dropout draws random numbers, which a checkpoint has to give back.
LONG = {
    "train__steps": "60",
    "evaluation__every": "60",
    "checkpoint__every": "50",
    "schedule": "constant",
    "schedule__warmup_steps": "0",
    "model__config__resid_pdrop": "0.1",
    "engine": "fsdp2",
}


def slowly(seconds: float) -> None:
    """Makes a step take so long that a test can come in between."""
    from distopt.engine import train_step
    from distopt.job import job as program

    def update(*args: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return train_step.update(*args, **more)

    program.update = update


@pytest.mark.parametrize(
    "number",
    [SIGNALS[0], *(pytest.param(number, marks=pytest.mark.matrix) for number in SIGNALS[1:])],
    ids=lambda number: number.name,
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(cwd: Path, number: signal.Signals) -> None:
    changes = {**LONG, **({"checkpoint__asynchronous": "true"} if number == signal.SIGUSR1 else {})}
    run = cwd / "runs" / "stopped"
    job = jobs.start(cwd, overrides(name="stopped", **changes), 2, slowly, 0.1)
    try:
        until(lambda: last_step(run) > 2, job.processes[1].is_alive)
        os.kill(job.processes[1].pid or 0, number)
        ended = job.wait(30)
    finally:
        job.kill()
    assert [rank.code for rank in ended] == [STOPPED, STOPPED], [rank.err for rank in ended]
    stopped = last_step(run)
    assert 2 < stopped < 50
    checkpoint = run / "checkpoints" / f"step_{stopped:08d}"
    line = f"distopt: stopped: by a signal, after step {stopped} of 60; train.resume=auto resumes from {checkpoint}"
    assert line in ended[0].err.splitlines() and "stopped" not in ended[1].err
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.matrix
def test_a_launch_that_is_asked_to_stop_resumes_bit_for_bit(cwd: Path) -> None:
    """SIGTERM to `accelerate launch`, which hands it on: what a preempted job gets."""
    run = cwd / "runs" / "stopped"
    with jobs.launched(cwd, overrides(name="stopped", **{**LONG, "train__steps": "600"})) as (process, _, err):
        until(lambda: last_step(run) > 5, lambda: process.poll() is None)
        process.terminate()
        assert process.wait(30) not in (0, None)
    (stopped,) = map(
        int, re.findall(r"^distopt: stopped: by a signal, after step (\d+) of 600;", err.read_text(), re.M)
    )
    assert last_step(run) == stopped
    more = {**LONG, "train__steps": str(stopped + 5)}
    out = jobs.train(cwd, 2, name="stopped", train__resume="auto", **more)[0].out
    assert f"resuming after step {stopped} from" in out
    jobs.train(cwd, 2, name="unbroken", **more)
    assert losses(run)[-5:] == losses(cwd / "runs" / "unbroken")[-5:]
    assert [step for step, *_ in losses(run)] == list(range(1, stopped + 6))


def slow_manifest(seconds: float) -> None:
    """Makes the end of a save take so long that a signal can come in between."""
    from distopt.checkpoint import manifest

    write = manifest.write

    def slowly(*args: Any) -> None:
        time.sleep(seconds)
        write(*args)

    manifest.write = slowly


def test_a_signal_while_the_last_checkpoint_is_written_does_not_lose_it(cwd: Path) -> None:
    changes = {"train__steps": "4", "evaluation__every": "4", "checkpoint__every": "4", "engine": "fsdp2"}
    words = overrides(name="late", checkpoint__asynchronous="true", **changes)
    job = jobs.start(cwd, words, 2, slow_manifest, 5.0)
    checkpoint = cwd / "runs" / "late" / "checkpoints" / "step_00000004"
    try:
        until(lambda: bool(list(checkpoint.glob("*/training.pt"))), job.processes[1].is_alive)
        for process in job.processes:
            os.kill(process.pid or 0, signal.SIGTERM)
        ended = job.wait()
    finally:
        job.kill()
    assert [rank.code for rank in ended] == [0, 0], [rank.err for rank in ended]
    assert (checkpoint / "manifest.json").is_file()
