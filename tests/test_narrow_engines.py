"""Moments in fewer bits on every engine: the same bits at every number of ranks, the planned bytes, or refused."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.engine import DDP, Zero1
from distopt.engine.train_step import update
from distopt.layout import local
from distopt.optim.clip import Clip
from distopt.plan.memory import footprint
from distopt.plan.rehearsal import units_of
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import CPU, DEEPSPEED, ENGINES, full
from tests.harness.optimizers import named

# A form of each rule, by kernels and without; given equal gradients all of them are in `tests.test_bits`.
NAMES = ("adamw_8_bits", "lamb_4_bits", "lars_16_bits", "lion_4_bits", "muon_8_bits")
STEPS = 3
NATIVE = [kind for kind in ENGINES if kind not in DEEPSPEED]


class Part(nn.Module):
    """Blocks of 32, 64 and 128, and two parameters without blocks."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(12, 64), (24, 2, 48), (24, 384), (4, 5), (7,)]
        self.all = nn.ParameterList([torch.zeros(shape) for shape in shapes])

    def forward(self, sample: Tensor, step: int) -> Tensor:
        return sum((p * slope(p.shape, i, step)).sum() for i, p in enumerate(self.all)) * sample


class Model(nn.Module):
    """A loss that is linear in the parameters, so that their gradient is a sum of integers, exact in every order."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.head = nn.Parameter(torch.zeros(36, 32))
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=numbers))

    def forward(self, sample: Tensor, step: int) -> Tensor:
        return self.part(sample, step) + (self.head * slope(self.head.shape, 9, step)).sum() * sample


@lru_cache
def slope(shape: torch.Size, i: int, step: int) -> Tensor:
    """Multiples of 12, times powers of 2: 2, 3 and 4 ranks divide them."""
    numbers = torch.Generator().manual_seed(10 * step + i)
    power = torch.randint(-12, 1, shape, generator=numbers)
    return 12.0 * torch.randint(-4, 5, shape, generator=numbers) * 2.0**power


def trained(kind: str, name: str) -> list[Tensor]:
    """The full weights after the last step of an engine's training, whose batch has a mean of 6 at any world size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine, model = ENGINES[kind](), Model()
    model = engine.build(model, [model.part], lambda unit, device: None, CPU)
    optimizer = named(name).make([*engine.unwrap(model).parameters()], **more(name))
    model = engine.attach(model, optimizer, 1, 100.0)
    samples = torch.tensor(6.0 + 2 * rank - (world - 1))
    for step in range(STEPS):
        update(engine, model, optimizer, [samples], 100.0, lambda of, sample, _: of(sample, step))  # noqa: B023
    distopt.prove(optimizer, engine.unwrap(model), state=True)
    return [*full(model).values()]


def more(name: str) -> dict[str, Any]:
    """Orthogonal matrices are multiplied by a library in its own order."""
    return {"ns_steps": 1} if "muon" in name else {}


def all_trained(kind: str) -> dict[str, list[Tensor]]:
    return {name: trained(kind, name) for name in NAMES}


@lru_cache
def unsharded() -> dict[str, list[Tensor]]:
    """Without an engine: one process, plain parameters."""
    found = {}
    for name in NAMES:
        model = Model()
        params = [*model.parameters()]
        optimizer = named(name).make(params, **more(name))
        for step in range(STEPS):
            optimizer.zero_grad()
            model(torch.tensor(6.0), step).backward()
            optimizer.step(clip=Clip(optimizer, 100.0))
        found[name] = [p.detach() for p in params]
    return found


@pytest.mark.parametrize(
    ("kind", "world"),
    some(
        [("zero1", 3), ("fsdp2", 2)],
        [(kind, world) for kind in NATIVE for world in (1, 2, 3, 4) if kind != "hsdp" or world % 2 == 0],
    ),
)
def test_an_engine_trains_with_the_bits_of_the_unsharded_run(kind: str, world: int) -> None:
    for found in run(world, all_trained, kind):
        for name in NAMES:
            assert all(map(torch.equal, found[name], unsharded()[name])), name


def test_what_the_runs_have_matters() -> None:
    """No two of them are alike, nor any like that with float32 moments."""
    runs = [unsharded()[name] for name in NAMES]
    assert not any(torch.equal(a[0], b[0]) for i, a in enumerate(runs) for b in runs[:i])


def refused(kind: str) -> str:
    model = Model()
    engine = ENGINES[kind]()
    model = engine.build(model, [model.part], lambda unit, device: None, CPU)
    optimizer = distopt.AdamW(engine.unwrap(model).parameters(), lr=0.1, state_bits=8)
    try:
        engine.attach(model, optimizer, 1, 1.0)
    except ValueError as error:
        return str(error)
    return ""


def test_deepspeed_is_refused() -> None:
    for said in run(2, refused, "deepspeed_zero1"):
        assert "state_bits=8 under DeepSpeed" in said and "use zero1 or FSDP2" in said


def held(bits: int) -> int:
    engine, model = Zero1(), Model()
    model = engine.build(model, [model.part], lambda unit, device: None, CPU)
    optimizer = distopt.AdamW(engine.unwrap(model).parameters(), lr=0.1, state_bits=bits)
    engine.attach(model, optimizer, 1, 1.0)
    optimizer.init_state()
    return sum(local(t).nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_plan_knows_the_bytes(bits: int) -> None:
    model = Model()
    optimizer = distopt.AdamW(model.parameters(), lr=0.1, state_bits=bits)
    optimizer.init_state()
    units = units_of(model, optimizer)
    of_one = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert footprint(DDP(), units, 2).state == of_one
    assert footprint(Zero1(), units, 3).state == max(run(3, held, bits))
