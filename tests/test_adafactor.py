"""Adafactor: torch's, on every layout; its factors are complete and equal on all ranks, and cost one all-reduce."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distopt
from distopt import load_checkpoint
from distopt.layout.places import Box, Run, boxes, global_indices, own_place
from distopt.optim import factored
from tests.harness.checkpoints import STEPS, assert_equal, everything, start, train
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance, initial, pull
from tests.harness.sharded import mesh
from tests.test_checkpoint import first_half, second_half

# Matrices, stacks of them (convolutions), vectors, a scalar, one row, one column, and nothing.
SHAPES = ((7, 5), (3, 4, 5), (4, 3, 2, 2), (6,), (), (1, 6), (6, 1), (5, 300))


def stepped(params: list[Tensor], opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        pull(params, step).backward()
        if step == 1:
            params[1].grad = None
        opt.step()


def test_the_defaults_and_the_state_are_torchs() -> None:
    """Every shape; a state dict of torch's goes into ours and back, and both go on alike."""
    ours, theirs = ([p.requires_grad_() for p in initial(*SHAPES)] for _ in range(2))
    opt, peer = distopt.Adafactor(ours), torch.optim.Adafactor(theirs)
    assert {**peer.defaults, **opt.defaults} == {**opt.defaults, "foreach": None}
    stepped(ours, opt, range(3))
    stepped(theirs, peer, range(3))
    states = copy.deepcopy((opt.state_dict(), peer.state_dict()))
    for p, q in zip(ours, theirs):
        assert opt.state[p].keys() == peer.state[q].keys()
        assert all(distance([opt.state[p][name]], [peer.state[q][name]]) < 1e-13 for name in peer.state[q])
    opt.load_state_dict(states[1])
    peer.load_state_dict(states[0])
    stepped(ours, opt, range(3, 6))
    stepped(theirs, peer, range(3, 6))
    assert distance(ours, theirs) < 1e-13


WAYS: dict[str, tuple[int, tuple[int, ...], Any]] = {
    "rows": (3, (3,), lambda ndim: [Shard(0)]),
    "columns": (3, (3,), lambda ndim: [Shard(ndim - 1)]),
    "second": (2, (2,), lambda ndim: [Shard(min(1, ndim - 1))]),
    "grid": (4, (2, 2), lambda ndim: [Shard(0), Shard(ndim - 1)]),
    "hybrid": (4, (2, 2), lambda ndim: [Replicate(), Shard(0)]),
    "inner": (4, (2, 2), lambda ndim: [Shard(ndim - 1), Replicate()]),
}


def sharded(way: str, dtype: torch.dtype, tile: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and factors after steps by gradients that are the same on every layout, each of them proved."""
    _, shape, how = WAYS.get(way, (1, (), None))
    where = mesh(shape, ("a", "b")[: len(shape)]) if how else None

    def placed(full: Tensor) -> Tensor:
        return distribute_tensor(full, where, how(full.ndim), src_data_rank=None) if how and full.ndim else full.clone()

    params = [nn.Parameter(placed(p)) for p in initial(*SHAPES, dtype=dtype)]
    opt = distopt.Adafactor(params, lr=0.3, d=1.05, weight_decay=0.1)
    numbers = torch.Generator().manual_seed(1)
    with mock.patch.object(factored, "_CPU_TILE", tile):
        for _ in range(3):
            for p in params:
                p.grad = placed(torch.randn(p.shape, generator=numbers, dtype=torch.float64).to(dtype))
            opt.step()
            if dist.is_initialized():
                distopt.prove(opt, state=True)
    factors = [opt.state[p][name] for p in params for name in ("row_var", "col_var") if name in opt.state[p]]
    assert not any(hasattr(factor, "placements") for factor in factors)
    return [whole(p) for p in params], factors


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


@pytest.mark.parametrize("way", ["rows", "grid", *[pytest.param(way, marks=pytest.mark.matrix) for way in WAYS]])
def test_rows_and_columns_are_those_of_the_full_matrix_however_it_is_sharded(way: str) -> None:
    """Uneven and empty shards, within rows, within columns, within stacks and across two axes; in tiles of 7 elements,
    too."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        expected, factors = sharded("", dtype, factored._CPU_TILE)
        for tile in (factored._CPU_TILE, 7):
            for ours, complete in run(WAYS[way][0], sharded, way, dtype, tile):
                assert distance(ours, expected) < tolerance
                assert distance(complete, factors) < tolerance


def all_reduces(layers: int) -> int:
    world = mesh((dist.get_world_size(),), ("shard",))
    params = [nn.Parameter(distribute_tensor(p, world, [Shard(0)])) for p in initial(*[(5, 4), (3,)] * layers)]
    opt = distopt.Adafactor([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        opt.step()
    return all_reduce.call_count


def test_a_step_has_two_all_reduces_whatever_the_number_of_layers() -> None:
    assert [run(2, all_reduces, layers) for layers in (2, 9)] == [[2, 2], [2, 2]]


def disagreeing() -> None:
    params = [nn.Parameter(distribute_tensor(p, mesh((2,), ("shard",)), [Shard(0)])) for p in initial((5, 4), (3, 4))]
    opt = distopt.Adafactor(params)
    opt.init_state()
    if dist.get_rank() == 1:
        opt.state[params[1]]["col_var"][0, 2] = 1.0
    distopt.prove(opt, state=True)


def test_the_proof_finds_a_factor_that_differs_between_ranks() -> None:
    with pytest.raises(RankError, match="col_var"):
        run(2, disagreeing)


def loaded(path: Path, engine: str) -> dict[str, np.ndarray]:
    parts = start(engine, "adafactor", seed=1)
    load_checkpoint(path, *parts)
    return everything(*parts[:2])


@pytest.mark.parametrize(("engine", "world"), [("zero1", 2), ("fsdp2", 4), ("none", 1)])
def test_a_checkpoint_loads_at_any_number_of_ranks_on_any_engine(tmp_path: Path, engine: str, world: int) -> None:
    """Bit for bit; then a run goes on as the unbroken one, but for the order of sums, in float64."""

    def on(world: int, function: Any, *args: Any) -> Any:
        return function(*args) if world == 1 else run(world, function, *args)[0]

    path = tmp_path / "it"
    on(world, first_half, path, engine, "adafactor")
    states = [on(number, loaded, path, other) for other, number in (("zero1", 3), ("fsdp2", 3), ("none", 1))]
    for state in states:
        del state["random"]
    assert any(name.endswith("row_var") for name in states[0])
    assert_equal(states[0], states[2])
    assert_equal(states[1], states[2])
    parts = start("none", "adafactor")
    train(*parts, 0, STEPS)
    expected = everything(*parts[:2])
    got = on(*((4, second_half, path, "fsdp2") if engine == "zero1" else (2, second_half, path, "zero1")), "adafactor")
    for found in (got, expected):
        del found["random"], found["calls"]
    assert_equal(got, expected, 1e-12)


def test_a_state_of_other_factors_is_refused_before_anything_changes() -> None:
    params = [p.requires_grad_() for p in initial((3, 4), (5,))]
    opt = distopt.Adafactor(params)
    stepped([*params, params[0]][:2], opt, range(1))
    before = copy.deepcopy(opt.state_dict())
    transposed = copy.deepcopy(before)
    transposed["state"][0]["row_var"] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"row_var of .* has shape \(4, 1\), its parameter \(3, 4\), of which it has"):
        opt.load_state_dict(transposed)
    lacking = copy.deepcopy(before)
    del lacking["state"][0]["col_var"]
    with pytest.raises(ValueError, match="lacks col_var"):
        opt.load_state_dict(lacking)
    lacking = copy.deepcopy(before)
    del lacking["state"][1]["variance"]
    with pytest.raises(ValueError, match="lacks variance"):
        opt.load_state_dict(lacking)
    assert torch.equal(opt.state[params[0]]["row_var"], before["state"][0]["row_var"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_ratio": True}, "trust_ratio=True: the steps of Adafactor are relative"),
        ({"eps": 1e-8}, "eps must be two numbers >= 0, or null and a number >= 0, got 1e-08"),
        ({"eps": (1e-8, None)}, "eps must be two numbers"),
        ({"eps": (-1.0, 1e-3)}, "eps must be two numbers"),
        ({"d": 0.5}, "d must be a number >= 1, got 0.5"),
        ({"beta2_decay": 0.8}, "beta2_decay must be a number <= 0, got 0.8"),
        ({"decoupled_weight_decay": False}, "weight decay is always decoupled here"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """In the constructor, in a group, and in mid-run."""
    params = initial((3, 4))
    with pytest.raises(ValueError, match=message):
        distopt.Adafactor(params, **options)
    with pytest.raises(ValueError, match=message):
        distopt.Adafactor([{"params": params, **options}])
    opt = distopt.Adafactor(params)
    if "trust_ratio" not in options:
        opt.param_groups[0].update(options)
        with pytest.raises(ValueError, match=message):
            opt.step()


def test_it_learns_where_gradients_are_tiny_zero_or_huge() -> None:
    """The factors' product underflows and overflows where the quotient does not: R / mean(R) comes first."""
    for size in (1e-22, 0.0, 1e18):
        p = torch.full((4, 3), 0.5, requires_grad=True)
        opt = distopt.Adafactor([p], lr=0.1, eps=(0.0 if size else None, 1e-3))
        p.grad = torch.full_like(p, size)
        opt.step()
        assert p.isfinite().all()
        assert p.sub(0.5).norm().item() == pytest.approx(0.1 * 0.5 * math.sqrt(12) if size else 0.0, rel=1e-5)


def test_a_run_is_boxes_that_have_its_elements() -> None:
    for shape in ((5, 7), (3, 4, 5), (2, 3, 2, 2), (11,), ()):
        numel = math.prod(shape)
        full = torch.arange(numel).view(shape)
        for low in range(0, numel, 2):
            for high in range(low, numel + 1, 3):
                found = [
                    (first, full[np.ix_(*map(list, box.indices))] if shape else full.clone())
                    for first, box in boxes(Run(low, high - low), shape)
                ]
                flat = torch.cat([torch.zeros(0).long(), *[block.reshape(-1) for _, block in found]])
                assert flat.tolist() == list(range(low, high))
                assert [first for first, _ in found] == [int(block.reshape(-1)[0]) - low for _, block in found]


def indices_of_shards() -> list[list[int]]:
    grid = mesh((2, 2), ("a", "b"))
    full = torch.arange(15).view(5, 3)
    found = []
    for how in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        shard = distribute_tensor(full, grid, how, src_data_rank=None)
        place = own_place(shard)
        assert isinstance(place, Box)
        index = [
            i for _, some in global_indices(place, shard.shape, torch.device("cpu"), chunk=2) for i in some.tolist()
        ]
        assert index == shard.to_local().reshape(-1).tolist()
        found.append(index)
    return found


def test_the_indices_of_a_shard_are_those_of_its_elements() -> None:
    run(4, indices_of_shards)
