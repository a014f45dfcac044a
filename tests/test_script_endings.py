"""Plain scripts over gloo end well: nothing of distopt is in flight when the interpreter is finalized."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.harness import jobs
from tests.harness.forkserver import context

ENDINGS = int(os.environ.get("DISTOPT_ENDINGS", "100"))  # of each script
START = """
import torch, distopt, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 1))
"""
TRAIN = """
for step in range(5):
    model(torch.randn(16, 32)).square().mean().backward()
    distopt.clip_grad_norm_(optimizer, 1.0)
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
dist.destroy_process_group()
"""
ZERO1 = """
model = DistributedDataParallel(model)
optimizer = distopt.LAMB(model.parameters())
optimizer.bind(distopt.layout.zero1_layout(model, gradients="reduce_scatter"{}))
"""
SCRIPTS = {
    "fsdp2": START + "fully_shard(model)\noptimizer = distopt.LAMB(model.parameters())\n" + TRAIN,
    "zero1": START + ZERO1.format("") + TRAIN,
    # The rows of the last step are on their way when the script ends: no forward pass waits for them.
    "zero1 with units": START + ZERO1.format(", units=[model.module[0], model.module[2]]") + TRAIN,
}
# What the count has to see: works of the script's own that gloo's threads let go of during finalization.
ABORTED = START + "for _ in range(3000):\n    dist.all_reduce(torch.ones(30000), async_op=True)\n"


def finalized(script: str, environment: dict[str, str], error: Path) -> None:
    """Runs a script, then ends as `python script.py` does; a child of multiprocessing would not be finalized."""
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT, 0o644), 2)
    os.environ.update(environment)
    try:
        exec(compile(script, "script.py", "exec"), sys.modules["__main__"].__dict__)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    ctypes.pythonapi.Py_Exit(0)


def endings(script: str, folder: Path, count: int) -> Counter[tuple[int | None, ...]]:
    """How often the two ranks of a script end with which exit codes."""
    seen: Counter[tuple[int | None, ...]] = Counter()
    for number in range(count):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        files = [(folder / f"{number}-{rank}.out", folder / f"{number}-{rank}.err") for rank in (0, 1)]
        ranks = []
        for rank in (0, 1):
            environment = jobs.torchrun(rank, 2, store.port)
            ranks.append(context.Process(target=finalized, args=(script, environment, files[rank][1])))
            files[rank][0].touch()
            ranks[-1].start()
        ended = jobs.Job(ranks, files, store).wait()
        seen[tuple(rank.code for rank in ended)] += 1
        assert not any("Error" in rank.err and rank.code == 1 for rank in ended), ended
    return seen


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_well(tmp_path: Path, name: str) -> None:
    seen = endings(SCRIPTS[name], tmp_path, ENDINGS)
    print(f"{name}: {seen[0, 0]} of {ENDINGS} scripts of 2 ranks ended with exit code 0: {dict(seen)}")
    assert seen == {(0, 0): ENDINGS}


@pytest.mark.matrix
def test_an_abort_would_be_seen(tmp_path: Path) -> None:
    seen = endings(ABORTED, tmp_path, 10)
    print(f"collectives of 3000 tensors that nobody waits for: {dict(seen)} of 10")
    assert any(-6 in codes for codes in seen)
