"""A long run with evaluation, checkpoints and restarts: memory, threads, files and disk stay flat."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import pytest

from tests.harness import jobs
from tests.harness.jobs import overrides
from tests.harness.runs import last_step, losses

STEPS = int(os.environ.get("DISTOPT_SOAK_STEPS", "5000"))
LIVES = 4  # of one run: all but the last are stopped by SIGTERM, save and are resumed
LONG = {
    "schedule": "constant",
    "schedule__warmup_steps": "0",
    "evaluation__every": "50",
    "checkpoint__every": "50",
    "checkpoint__keep": "2",
    "checkpoint__best": "validation_loss",
    "train__prove_every": "100",
    "trackers": "[tensorboard]",
}


class Use(NamedTuple):
    """What a rank uses at a moment; memory in MiB."""

    memory: float
    threads: int
    files: int


def use(pid: int) -> Use:
    process = psutil.Process(pid)
    with process.oneshot():
        return Use(process.memory_info().rss / 2**20, process.num_threads(), process.num_fds())


def lived(cwd: Path, words: list[str], stop: int | None) -> list[list[Use]]:
    """One life of the run, to its end or to SIGTERM after a step: what each rank used, over time."""
    run, job = cwd / "runs" / "soak", jobs.start(cwd, words, 2)
    begun, told, seen = last_step(run), False, [[] for _ in job.processes]
    while all(process.is_alive() for process in job.processes):
        now = last_step(run)
        for process, uses in zip(job.processes, seen):
            if now > begun + 20:  # all that is made at first is there
                try:
                    uses.append(use(process.pid))
                except psutil.NoSuchProcess:
                    break
        if stop is not None and now >= stop and not told:
            told = True
            for process in job.processes:
                os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
    codes = [ended.code for ended in job.wait(60)]
    assert codes == [0 if stop is None else 75] * 2, codes
    return seen


@pytest.mark.matrix
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ["zero1", "fsdp2"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_grows(cwd: Path, engine: str, asynchronous: bool) -> None:
    run = cwd / "runs" / "soak"
    shared = {**LONG, "engine": engine, "checkpoint__asynchronous": str(asynchronous).lower()}
    words = overrides(name="soak", train__resume="auto", train__steps=str(STEPS), **shared)
    for life in range(LIVES):
        stop = STEPS * (life + 1) // LIVES if life < LIVES - 1 else None
        for rank, uses in enumerate(lived(cwd, words, stop)):
            fifth = len(uses) // 5
            early, late = uses[fifth : 2 * fifth], uses[-fifth:]
            grown = median(each.memory for each in late) - median(each.memory for each in early)
            print(f"{engine} life {life} rank {rank}: {late[-1]}, {grown:+.1f} MiB in {len(uses)} samples")
            assert grown < 4.0, (life, rank, grown)
            assert max(each.threads for each in late) <= max(each.threads for each in early), (life, rank)
            assert max(each.files for each in late) <= max(each.files for each in early), (life, rank)
        kept = {path.name for path in (run / "checkpoints").iterdir()}
        assert len([name for name in kept if name.startswith("step_")]) <= 3, kept  # the newest two and the best one
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))
