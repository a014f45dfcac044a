"""Given equal gradients an update is the same bits on every layout that shards by rows, at every number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.bits import JOBS, WORLDS, on_ranks, unsharded
from tests.harness.cells import some
from tests.harness.distributed import run

QUICK = [
    ("zero1", 3, "kernels", "some"),
    ("hsdp", 4, "kernels", "some"),
    ("fsdp2", 2, "rules", "some"),
    ("zero1", 2, "kernels", "some_narrow"),
    ("buckets", 3, "rules", "some_narrow"),
]
JOBS_OF = ("every", "every_narrow")
EVERY = [(kind, world, by, jobs) for kind, world in WORLDS for by in ("kernels", "rules") for jobs in JOBS_OF]


@pytest.mark.parametrize(("kind", "world", "by", "which"), some(QUICK, dict.fromkeys(QUICK + EVERY)))
def test_the_same_bits(kind: str, world: int, by: str, which: str) -> None:
    """Weights, perturbed weights and state, of every optimizer and of SAM's family around it, with clipping.

    "narrow" ones: with moments in 16, 8 and 4 bits.
    """
    for found in filter(None, run(world, on_ranks, kind, by, which)):
        wrong: dict[str, Any] = {}
        for job in JOBS[which]:
            pairs = zip(found[job], unsharded(by, job), strict=True)
            wrong[job] = [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
        assert not {job: indices for job, indices in wrong.items() if indices}
