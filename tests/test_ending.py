"""How the process of a job ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness import jobs

# Thousands of tensors that only gloo's workers still hold, as after any last collective a worker may, for a moment.
PROGRAM = """
import atexit, sys
import torch, torch.distributed as dist
from distopt import train

def job():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(3000):
        dist.all_reduce(torch.ones(30000), async_op=True)
    atexit.register(print, "atexit", end=" ")
    print("trained", end=" ")
    {end}

train.job = job
train.main()
"""


@pytest.mark.parametrize(
    ("end", "code", "err"),
    [
        ("return", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
        ("raise ValueError('a reason')", 1, "distopt: error: a reason\n"),
    ],
)
def test_gloo_does_not_abort_a_job_that_has_ended(end: str, code: int, err: str) -> None:
    """A job that had saved everything ended with -6 once in hundreds of runs, and its launcher said that it failed."""
    program, env = PROGRAM.format(end=end), {**os.environ, **jobs.ENVIRONMENT}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "trained atexit ", err)
