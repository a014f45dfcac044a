"""A long run with evaluation, checkpoints and restarts: memory, threads, files and disk stay flat."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import pytest

from tests.harness import jobs
from tests.harness.jobs import metrics, overrides
from tests.harness.runs import losses

STEPS = int(os.environ.get("DISTOPT_SOAK_STEPS", "5000"))
SECONDS = 1200.0  # of a life on a quiet machine
WARM = 20  # steps, after which all that is made at first is there
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


def at(run: Path) -> int:
    """The step of the last row of the metrics, of which only the end is read; 0 before the first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            rows = file.read().splitlines()[1:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(rows[-1])["step"]) if rows else 0


def lived(cwd: Path, words: list[str], stop: int | None) -> list[list[Use]]:
    """One life of the run, to its end or to SIGTERM after a step: what each rank used, over time."""
    run, job = cwd / "runs" / "soak", jobs.start(cwd, words, 2)
    begun, told, seen = at(run), False, [[] for _ in job.processes]
    deadline = time.monotonic() + SECONDS * jobs.PATIENCE
    while all(process.is_alive() for process in job.processes):
        assert time.monotonic() < deadline, f"still at step {at(run)}"
        now = at(run)
        if now > begun + WARM:
            with contextlib.suppress(psutil.NoSuchProcess):
                for uses, each in zip(seen, [use(process.pid) for process in job.processes]):
                    uses.append(each)
        if stop is not None and now >= stop and not told:
            told = True
            for process in job.processes:
                os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
    ended = job.wait(60)
    assert [rank.code for rank in ended] == [0 if stop is None else 75] * 2, ended
    return seen


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("engine", "asynchronous"), [("zero1", False), ("fsdp2", True)])
def test_nothing_grows(cwd: Path, engine: str, asynchronous: bool) -> None:
    """In the last fifth of a life a rank uses what it used in the second one."""
    run = cwd / "runs" / "soak"
    shared = {**LONG, "engine": engine, "checkpoint__asynchronous": str(asynchronous).lower()}
    words = overrides(name="soak", train__resume="auto", train__steps=str(STEPS), **shared)
    sizes = []
    for life in range(LIVES):
        stop = STEPS * (life + 1) // LIVES if life < LIVES - 1 else None
        for rank, uses in enumerate(lived(cwd, words, stop)):
            fifth = len(uses) // 5
            early, late = uses[fifth : 2 * fifth], uses[-fifth:]
            memory, threads, files = ([median(each[i] for each in part) for part in (early, late)] for i in range(3))
            print(
                f"{engine}, life {life}, rank {rank}, {len(uses)} samples: {memory[0]:.1f} -> {memory[1]:.1f} MiB, "
                f"{threads[0]} -> {threads[1]} threads, {files[0]} -> {files[1]} files",
                flush=True,
            )
            assert memory[1] < memory[0] + 4.0, (life, rank)
            assert threads[1] <= threads[0] + 1 and files[1] <= files[0] + 1, (life, rank)
        kept = {path.name for path in (run / "checkpoints").iterdir()}
        assert len([name for name in kept if name.startswith("step_")]) <= 3, kept  # the newest two and the best one
        sizes.append(sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if not file.is_symlink()))
    assert max(sizes) < 1.6 * min(sizes), sizes  # two checkpoints, or three
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))
    validated = [row["step"] for row in metrics(run) if "validation_loss" in row]
    print(f"{engine}: {STEPS} steps in {LIVES} lives, {len(validated)} evaluations, checkpoints {[*sizes]} bytes")
