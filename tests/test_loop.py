"""The training loop: what it reads from the device and when, batches from a thread, garbage at fixed steps."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.data.batch import Batch
from distopt.data.prefetch import Prefetch
from distopt.job.late import Late, garbage_collected_by_hand
from distopt.job.records import read_metrics
from tests.harness import jobs


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors by `item`, `float` and `bool`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def watch_reads(file: str) -> None:
    """Writes for each step what was read in it outside of `optimizer.step`, which keeps its counts on the host, and how
    many rows of losses there were when it ended."""
    from distopt.job import job as program

    take, read = program.Job.train_step, Late.read
    lists = 0

    def counted_read(self: Late) -> list[float]:
        nonlocal lists
        lists += 1
        return read(self)

    def counted(self: Any, *args: Any) -> Any:
        nonlocal lists
        lists, own, mode = 0, self.optimizer.step, Reads()

        def step(*args: Any, **kwargs: Any) -> Any:
            before = mode.count
            own(*args, **kwargs)
            mode.count = before

        self.optimizer.step = step
        try:
            with mode:
                done = take(self, *args)
        finally:
            del self.optimizer.step
        rows = sum("loss" in row for row in read_metrics(self.folder))
        with Path(file).open("a") as lines:
            lines.write(json.dumps([self.step, mode.count, lists, rows]) + "\n")
        return done

    Late.read, program.Job.train_step = counted_read, counted  # type: ignore[method-assign]


def test_a_step_reads_the_norm_and_the_loss_of_the_step_before(cwd: Path) -> None:
    """The loss was read in its own step: the host waited for the device twice in each. The schedule wraps `step`, which
    is not the one to count, so the rate is constant."""
    jobs.train(cwd, 1, watch_reads, str(cwd / "reads"), name="p", train__steps="6", evaluation__every="4")
    found = [json.loads(line) for line in (cwd / "reads").read_text().splitlines()]
    # The step after an evaluation and a checkpoint, at 4, has nothing left to read.
    assert found == [[1, 1, 0, 0], [2, 1, 1, 1], [3, 1, 1, 2], [4, 1, 1, 3], [5, 1, 0, 4], [6, 1, 1, 5]]
    rows = read_metrics(cwd / "runs" / "p")
    assert [(row["step"], "loss" in row) for row in rows] == [
        (0, False), (1, True), (2, True), (3, True), (4, True), (4, False), (5, True), (6, True), (6, False),
    ]  # fmt: skip


def die_in_step(number: int) -> None:
    from distopt.job import job as program

    update, calls = program.update, iter(range(1, 1000))

    def dying(*args: Any, **more: Any) -> Any:
        if next(calls) == number:
            raise ValueError("refused in mid-run")
        return update(*args, **more)

    program.update = dying


def test_a_run_that_ends_by_an_error_has_the_rows_of_all_its_steps(cwd: Path) -> None:
    (ended,) = jobs.run(cwd, jobs.overrides(name="p"), 1, die_in_step, 4)
    assert ended.code == 1 and "refused in mid-run" in ended.err
    assert [row["step"] for row in read_metrics(cwd / "runs" / "p") if "loss" in row] == [1, 2, 3]


def test_batches_of_a_thread_are_those_of_their_index() -> None:
    made: list[tuple[int, bool]] = []
    running = 0

    def make(index: int) -> int:
        nonlocal running
        running += 1
        assert running == 1, "two at a time"
        made.append((index, threading.current_thread() is threading.main_thread()))
        time.sleep(0.01)
        running -= 1
        if index == 9:
            raise ValueError("no batch 9")
        return 10 * index

    batches = Prefetch(make)
    assert [batches.get(i) for i in (0, 1, 2, 7, 8)] == [0, 10, 20, 70, 80]  # 7: others are passed over
    with pytest.raises(ValueError, match="no batch 9"):
        batches.get(9)
    batches.close()
    assert made == [(0, True), (1, False), (2, False), (3, False), (7, True), (8, False), (9, False)]


def test_a_batch_moves_with_all_its_tensors() -> None:
    ones = torch.ones(2, 3, dtype=torch.int64)
    moved = Batch(ones, ones + 1, ones + 2, 1.5).to(torch.device("meta"), non_blocking=True)
    assert all(t is not None and t.is_meta for t in (moved.inputs, moved.labels, moved.positions))
    assert Batch(ones, ones, None, 1.5).to(torch.device("cpu")).positions is None


@pytest.mark.parametrize("frozen", [False, True])
def test_garbage_is_collected_at_fixed_steps(frozen: bool) -> None:
    """What the program has frozen stays frozen."""
    gc.freeze() if frozen else gc.unfreeze()
    collected: list[int] = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]) if phase == "start" else None)
    try:
        with garbage_collected_by_hand() as collect:
            collected.clear()
            assert not gc.isenabled()
            for step in range(1, 101):
                rings = [[] for _ in range(1000)]
                for ring in rings:
                    ring.append(ring)
                collect(step)
            assert collected == [2, 2]
    finally:
        gc.callbacks.pop()
    assert gc.isenabled() and bool(gc.get_freeze_count()) == frozen
    gc.freeze()  # as for all tests
