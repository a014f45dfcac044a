"""How the process of a job ends."""

from __future__ import annotations

import pytest

from distopt.job.errors import one_line_errors
from tests.harness import jobs
from tests.harness.cells import some

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


ENDS = [
    ("return", 0, ""),
    ("sys.exit()", 0, ""),
    ("sys.exit(75)", 75, ""),
    ("sys.exit('a reason')", 1, "a reason\n"),
    ("raise ValueError('a reason')", 1, "distopt: error: a reason\n"),
]


@pytest.mark.parametrize(("end", "code", "err"), some([ENDS[0], ENDS[4]], ENDS))
def test_gloo_does_not_abort_a_job_that_has_ended(end: str, code: int, err: str) -> None:
    """A job that had saved everything ended with -6 once in hundreds of runs, and its launcher said that it failed."""
    assert jobs.python("-c", PROGRAM.format(end=end)) == (code, "trained atexit ", err)


def test_ctrl_c_in_a_program_that_has_nothing_to_save_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`distopt sample`, `plan` or `export` showed the traceback of whatever was being imported, 60 lines of it."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert (end.value.code, capsys.readouterr().err) == (130, "\ndistopt: interrupted\n")
