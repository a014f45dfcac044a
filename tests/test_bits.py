"""Given equal gradients an update is the same bits on every layout that shards by rows, at every number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.bits import JOBS, WORLDS, on_ranks, unsharded
from tests.harness.distributed import run

QUICK = {("zero1", 3, "kernels"), ("buckets", 3, "kernels"), ("hsdp", 4, "kernels"), ("fsdp2", 2, "rules")}
EVERY = [(kind, world, by) for kind, world in WORLDS for by in ("kernels", "rules")]


@pytest.mark.parametrize(
    ("kind", "world", "by"), [pytest.param(*job, marks=[] if job in QUICK else [pytest.mark.matrix]) for job in EVERY]
)
def test_the_same_bits(kind: str, world: int, by: str) -> None:
    """Weights, perturbed weights and state, of every optimizer and of SAM's family around it, with clipping."""
    expected = unsharded(by)
    for found in filter(None, run(world, on_ranks, kind, by)):
        wrong: dict[str, Any] = {
            job: [i for i, (a, b) in enumerate(zip(found[job], expected[job], strict=True)) if not torch.equal(a, b)]
            for job in JOBS
        }
        assert not {job: which for job, which in wrong.items() if which}
