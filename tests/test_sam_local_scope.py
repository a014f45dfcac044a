"""SAM with `scope="local"`: each rank ascends by its own gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from benchmarks.collectives import Collectives
from distopt import SAM
from distopt.engine import FSDP2
from tests.harness import oracles, oracles_sam
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance, named
from tests.harness.sam_steps import Losses, Wrapped, leaves, own_loss, samples_of, values
from tests.harness.sams import RHO
from tests.harness.sharded import reduce_scattered, shard, whole


def own_pass(sam: SAM, model: nn.Module, step: int, accumulation: int, exchange: bool) -> None:
    sam.zero_grad()
    for i in range(accumulation):
        last = exchange and i == accumulation - 1
        with contextlib.nullcontext() if last else model.no_sync():
            (model(torch.tensor(100 * step + dist.get_rank())) / accumulation).backward()


# Full weights on every rank: the layout that the optimizer is bound to, of a model of one unit.
WHOLE: dict[str, Callable[[DistributedDataParallel], Any]] = {
    "ddp": lambda model: None,
    "zero1": distopt.layout.zero1_layout,
    "zero1, scattered": reduce_scattered,
    "zero1, scattered, units": lambda model: distopt.layout.zero1_layout(
        model, units=[model.module[0]], gradients="reduce_scatter"
    ),
}


def local_steps(where: str, accumulation: int) -> tuple[list[Tensor], list[list[str]]]:
    """Steps of SAM and ASAM by each rank's own gradient; the collectives of their first passes."""
    counts, ends = [], []
    for member, kwargs in ((SAM, {}), (distopt.ASAM, {"eta": 0.02})):
        model = DistributedDataParallel(nn.Sequential(Wrapped()), gradient_as_bucket_view=True)
        row = named("momentum")
        inner = row.make(row.groups(list(model.parameters())))
        if (bound := WHOLE[where](model)) is not None:
            inner.bind(bound)
        sam = member(inner, RHO, scope="local", **kwargs)

        for step in range(4):
            with Collectives() as mode:
                own_pass(sam, model, step, accumulation, exchange=False)
                sam.perturb()
            # In its second step DDP orders its buckets anew, once, and tells the other ranks.
            counts.append([op for op in mode.seen if "broadcast" not in op])
            with Collectives() as mode:
                own_pass(sam, model, step, accumulation, exchange=True)
            assert mode.seen  # or the counter sees nothing of DDP
            sam.restore()
            sam.step()
        assert inner.layout  # waits
        ends += values(model.parameters())
    return ends, counts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", WHOLE)
def test_local_scope_is_the_mean_of_each_ranks_own_step(where: str, world: int, accumulation: int) -> None:
    """m-sharpness under DDP and ZeRO-1, with no communication before the second pass."""
    row, params = named("momentum"), leaves()[1:5]
    grads = [oracles.gradient_of(lambda ps, step, rank=rank: own_loss(ps, 100 * step + rank)) for rank in range(world)]
    expected = [
        *row.expected(params, oracles_sam.local_sam(grads, RHO), 4)[-1],
        *row.expected(params, oracles_sam.mean_of([oracles_sam.asam(g, RHO, 0.02) for g in grads]), 4)[-1],
    ]
    for ends, counts in run(world, local_steps, where, accumulation):
        assert counts == [[]] * 8
        assert distance(ends, expected) < 1e-12
    average_first = row.expected(params, oracles_sam.sam(oracles_sam.mean_of(grads), RHO), 4)[-1]
    assert distance(average_first, expected[:4]) > 1e-3  # another algorithm


def local_on_shards() -> None:
    models = shard("fsdp2", Losses({"one": whole("fsdp2")}))
    sam = SAM(distopt.SGD(models.parameters()), scope="local")
    models(samples_of("fsdp2", 0), 0)["one"].mean().backward()
    sam.perturb()


def test_local_scope_is_refused_where_weights_are_sharded() -> None:
    with pytest.raises(RankError, match=r"scope=local needs full weights on every rank, as under DDP"):
        run(2, local_on_shards)
    with pytest.raises(ValueError, match=r"sam\.scope=local needs full weights on every rank: use engine=ddp or zero1"):
        FSDP2().check_sam(SAM(distopt.SGD(leaves()), scope="local"))
