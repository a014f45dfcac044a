"""Float32 masters of 16-bit parameters on every layout, and ZeRO-1's even shares of the state."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt import AdamW
from distopt.layout import local
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.optimizers import Row, distance, every_row, initial
from tests.harness.sharded import mesh

# Parameters of 16 bits.


def train_masters(row: Row, kind: str) -> tuple[bool, set[torch.dtype], float]:
    """bfloat16 parameters stepped by float32 masters, with the state saved and loaded on the way: whether every step
    gave the rounded masters of the unsharded run, what the state is kept in, and its share of the full state."""
    start = [p.to(torch.bfloat16) for p in initial((5, 3), (4,), (6, 2))]
    ranks = mesh((dist.get_world_size(),), ("shard",))

    def laid_out(t: Tensor) -> Tensor:
        return distribute_tensor(t, ranks, [Shard(0)]) if kind == "fsdp2" else t.clone()

    params = [nn.Parameter(laid_out(p)) for p in start]
    masters = [p.float().requires_grad_() for p in start]
    opt, whole_opt = row.make(row.groups(params)), row.make(row.groups(masters))
    if kind == "zero1":
        opt.bind(distopt.layout.zero1_layout(nn.ParameterList(params), ranks))
    same = True
    for step in range(6):
        for i, (p, master) in enumerate(zip(params, masters)):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = laid_out(noise.to(torch.bfloat16))
            master.grad = noise.to(torch.bfloat16).float()
        opt.step()
        whole_opt.step()
        now = [p.full_tensor() if kind == "fsdp2" else p for p in params]
        close = [torch.isclose(p, m.to(torch.bfloat16), rtol=2**-7, atol=0).all() for p, m in zip(now, masters)]
        same = same and all(close)
        if step == 2:
            opt.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    kept = [local(t) for values in opt.state.values() for key, t in values.items() if key not in row.counts]
    difference = max(distance([p.float()], [m]) for p, m in zip(now, masters))
    return bool(same), {t.dtype for t in kept}, float(difference)


@every_row
@pytest.mark.parametrize("world", some([2], [1, 2, 4]))
def test_16_bit_parameters_have_masters_on_every_layout(row: Row, world: int) -> None:
    """Without masters, steps below half a unit in the last place of bfloat16 are lost, and weights stop changing."""
    for kind in ("replicated", "zero1", "fsdp2"):
        for same, dtypes, difference in run(world, train_masters, row, kind):
            assert same, kind
            assert dtypes == {torch.float32}
            assert difference < 2**-8  # half a unit in the last place


def share(numels: str, world: int) -> float:
    """Returns the largest rank's share of the AdamW state under ZeRO-1, times the number of ranks."""
    shapes = {
        "gpt2": [(50257, 64), (1024, 64), *[(64, 192), (192,), (64, 64), (64,), (64, 256), (256,), (256, 64)] * 4],
        "llama": [(32000, 64), *[(64, 64), (32, 64), (172, 64), (172, 64), (64, 172), (64,), (64,)] * 4, (32000, 64)],
        "embedding": [(20000, 64), (64, 64), (64,), (3,), (1,)],
    }[numels]
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    opt = AdamW(model.parameters())
    opt.bind(distopt.layout.zero1_layout(model, mesh((world,), ("shard",))))
    opt.init_state()
    held = sum(local(t).numel() for values in opt.state.values() for key, t in values.items() if key != "step")
    return held * world / (2 * sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("shapes", ["gpt2", "llama", "embedding"])
@pytest.mark.parametrize("world", [2, 4])
def test_zero1_divides_the_state_evenly(shapes: str, world: int) -> None:
    """Within 1 %; torch's ZeroRedundancyOptimizer, which shards no tensor, gives one rank 154 times the other's."""
    assert max(run(world, share, shapes, world)) < 1.01
