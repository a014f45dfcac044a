"""A job whose rank hangs ends within the timeout, on every engine, with a line that names the rank."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.harness import faults, jobs
from tests.harness.jobs import overrides
from tests.harness.runs import last_step, until

ENGINES = ("ddp", "zero1", "zero2", "fsdp2", "hsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
QUICK = ("deepspeed_zero2",)  # whose groups have no timeout
MINUTES = 0.2


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=() if engine in QUICK else pytest.mark.matrix) for engine in ENGINES]
)
def test_a_rank_that_hangs_is_named_within_the_timeout(cwd: Path, engine: str) -> None:
    job = jobs.start(
        cwd, overrides(name="hangs", engine=engine, train__timeout_minutes=str(MINUTES)), 2, faults.pause, 4
    )
    run = cwd / "runs" / "hangs"
    try:
        until(lambda: last_step(run) == 2, job.processes[0].is_alive)  # its row comes a step late
        began = time.monotonic()
        job.processes[0].join(120)
        took = time.monotonic() - began
    finally:
        job.kill()
    err = job.files[0][1].read_text()
    assert job.processes[0].exitcode == 1, err
    assert took < 60 * MINUTES + 5  # and what it takes to end a process here
    (line,) = re.findall(r"^distopt: error: .*$", err, re.M)
    host = socket.gethostname()
    assert line.startswith(f"distopt: error: step 4 takes longer than train.timeout_minutes={MINUTES:g} in distopt.")
    assert line.endswith(f": rank 1 on {host} does not answer")


def test_a_rank_that_dies_leaves_a_line_and_no_traceback(cwd: Path) -> None:
    ended = jobs.run(cwd, overrides(name="dies", engine="fsdp2"), 2, faults.die_in_forward, 7)
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    assert "distopt: error: another rank has ended; its message says why" in ended[0].err.splitlines()
    assert "Traceback" not in ended[0].err
