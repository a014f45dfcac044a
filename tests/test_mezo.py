"""MeZO, and the noise that every shard of a tensor draws for itself."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distopt
from distopt import counter
from tests.harness.distributed import run
from tests.harness.optimizers import distance
from tests.harness.sharded import mesh

_MASK = 2**64 - 1


def written_out(seed: int, name: str, i: int) -> float:
    """The definition, in Python's integers and its mathematical functions: SplitMix64, and Box and Muller."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    x = (key + (i + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    x ^= x >> 31
    u, v = (((x >> 32) + 0.5) * 2.0**-32, ((x & 0xFFFFFFFF) + 0.5) * 2.0**-32)
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v)


def noise(seed: int, name: str, start: int, numel: int) -> Tensor:
    return counter.normals(counter.key(f"{seed}:{name}"), torch.arange(start, start + numel)).float()


def test_noise_is_as_defined() -> None:
    """To the rounding to float32 of values up to 5."""
    for seed, name in ((0, "a"), (7, "3:layer.$weight")):
        expected = torch.tensor([written_out(seed, name, i) for i in range(300)], dtype=torch.float64)
        assert (noise(seed, name, 0, 300).double() - expected).abs().max() < 3e-7


def test_noise_is_the_same_however_it_is_divided() -> None:
    full = noise(3, "w", 0, 1000)
    parts = [noise(3, "w", start, numel) for start, numel in ((0, 7), (7, 1), (8, 0), (8, 991), (999, 1))]
    assert torch.equal(torch.cat(parts), full)


def test_noise_is_normal_and_independent() -> None:
    """Moments, and correlations with the neighbour, another name, step and seed, within four of their deviations."""
    count = 50_000
    z = noise(0, "w", 0, count).double()
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((z**power).mean().item() - mean) < 4.0 * math.sqrt(variance / count)
    for other in (z.roll(1), noise(0, "v", 0, count), noise(1, "w", 0, count), noise(0, "1:w", 0, count)):
        assert abs((z * other.double()).mean().item()) < 4.0 / math.sqrt(count)


def pull(w: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (w - 2.0).square().sum() + 0.25 * (b.sum() - w.mean()) ** 2


def test_every_step_equals_the_formula() -> None:
    """z is rounded to float32 by two ways, 6e-8 of it."""
    named = {"w": torch.ones(3, 4, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    params = {name: nn.Parameter(p.clone()) for name, p in named.items()}
    optimizer = distopt.MeZO(params.items(), lr=1e-2, eps=1e-3, weight_decay=0.1, seed=5)
    for step in range(4):
        z = {
            n: torch.tensor([written_out(5, f"{step}:{n}", i) for i in range(p.numel())]).view(p.shape)
            for n, p in named.items()
        }
        up, down = (pull(*(named[n] + sign * 1e-3 * z[n] for n in named)).item() for sign in (1, -1))
        slope = (up - down) / 2e-3
        named = {n: p - 1e-2 * (slope * z[n] + 0.1 * p) for n, p in named.items()}
        loss = optimizer.step(lambda: pull(*params.values()))
        assert loss == pytest.approx(0.5 * (up + down), rel=1e-6)
        assert distance([p.detach() for p in params.values()], [*named.values()]) < 1e-6


def test_a_state_dict_continues_with_the_next_noise() -> None:
    def walk(optimizer: distopt.MeZO, p: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.step(lambda: p.square().sum())
        return p.detach().clone()

    first, second = (nn.Parameter(torch.ones(6)) for _ in range(2))
    one, two = (distopt.MeZO([p], lr=1e-2, seed=1) for p in (first, second))
    half = walk(one, first, 3)
    two.load_state_dict(one.state_dict())
    second.data.copy_(half)
    assert torch.equal(walk(one, first, 3), walk(two, second, 3))


def test_what_the_way_up_down_and_back_leaves_is_bounded() -> None:
    """3 halves of a unit in the last place for each of 50 steps; also after an error in either pass."""
    p = nn.Parameter(torch.linspace(-2.0, 2.0, 1000))
    start, optimizer = p.detach().clone(), distopt.MeZO([p], lr=0.0)

    def broken() -> float:
        raise RuntimeError("no batch")

    for i in range(50):
        if i % 10 == 9:
            with pytest.raises(RuntimeError, match="no batch"):
                optimizer.step(broken)
        optimizer.step(lambda: p.square().sum())
    assert (p.detach() - start).abs().max() < 55 * 1.5 * 2.0**-23 * 2.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"eps": 0.0}, "eps must be a number > 0, got 0.0"),
        ({"seed": True}, "seed must be an integer >= 0, got True"),
        ({"params": [torch.zeros(2, dtype=torch.bfloat16)]}, "MeZO moves weights by eps, which torch.bfloat16 rounds"),
    ],
)
def test_bad_input_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distopt.MeZO(**{"params": [torch.zeros(2)]} | given)


def test_gradients_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="MeZO has no use for gradients"):
        distopt.MeZO([p]).step(lambda: 0.0)


def test_a_step_without_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a closure that returns the loss"):
        distopt.MeZO([nn.Parameter(torch.ones(2))]).step()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3))


def fine_tuned(kind: str) -> list[Tensor]:
    """The full weights after 5 steps; each rank has its part of a batch of 8."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = net()
    if kind == "fsdp2":
        for unit in (model[0], model):
            fully_shard(unit, mesh=mesh((ranks,), ("shard",)))
    optimizer = distopt.MeZO(model.named_parameters(), lr=1e-2, eps=0.05, model=model)
    for step in range(5):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        optimizer.step(lambda x=x: model(x).square().sum(1).mean() + model(x)[:, 0].mean())
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def test_it_is_the_same_on_shards() -> None:
    """A slope is a difference of two float32 losses, over 2 eps: 1e-7 / 0.1 of a weight. FSDP2 keeps the root's full
    parameters after a forward pass; with those of the first point, the second loss would be another."""
    expected, start = fine_tuned("alone"), [p.detach() for p in net().parameters()]
    assert distance(expected, start) > 1e-2
    for kind in ("replicated", "fsdp2"):
        for found in run(2, fine_tuned, kind):
            assert distance(found, expected) < 1e-5, kind
