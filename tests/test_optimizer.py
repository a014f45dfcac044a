"""The driver: the update of the full model however it is sharded, state on every rank, and refusals."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt import LAMB, SGD, Adagrad
from distopt.layout import Segment, ShardLayout, local
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import ROWS, Row, distance, every_row, initial, named, pull
from tests.harness.sharded import (
    EVERYWHERE,
    MODELS,
    Fleet,
    backward,
    bind,
    full,
    mesh,
    shard,
    sharded,
    unsharded,
    whole,
)

# Muon takes a flat partition, and vectors, for what its group says: no matrices.
every_row_of_elements = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name != "muon"], ids=[row.name for row in ROWS if row.name != "muon"]
)

STEPS = 5
MAX_NORM = 1.0  # shorter than any of the gradients
# What is left is the order of sums, in norms and over samples: 1e-16 or 6e-8 in each of 5 steps, stretched where a
# second moment is small (Adam).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


# The update of the full model.


def train(kind: str, world: int) -> dict[str, dict[torch.dtype, list[Tensor]]]:
    """Returns the full parameters after clipped steps in two param groups, by every row; world 0 is unsharded."""
    results: dict[str, dict[torch.dtype, list[Tensor]]] = {row.name: {} for row in ROWS}
    for dtype in TOLERANCE:
        models = Fleet({row.name: whole(kind, dtype) for row in ROWS})
        if world:
            shard(kind, models)
        optimizers = [row.make(row.groups([*models[row.name].parameters()])) for row in ROWS]
        for row, opt in zip(ROWS, optimizers):
            bind(kind, opt, models[row.name])
        for step in range(STEPS):
            models.zero_grad()
            backward(models, kind, step)
            for opt in optimizers:
                if step % 2 == 0:
                    distopt.clip_grad_norm_(opt, max_norm=MAX_NORM)
                opt.step()
        params = iter(full(models))
        for row in ROWS:
            results[row.name][dtype] = [next(params) for _ in models[row.name].parameters()]
    return results


@lru_cache
def trained(kind: str, world: int) -> list[dict[str, dict[torch.dtype, list[Tensor]]]]:
    """On every rank; for world 0 in this process alone, with the optimizers that `test_rules` checks."""
    return run(world, train, kind, world) if world else [train(kind, world)]


# Where other numbers of ranks, or the same ranks with shards, test nearly the same; experts have `test_experts`.
REPEATED = {("replicated", 2), ("replicated", 4), ("zero1", 1), ("zero1", 4), ("fsdp2", 1), ("fsdp2", 2)}
REPEATED |= {("experts", 4)}


@every_row
@pytest.mark.parametrize(("kind", "world"), some([each for each in EVERYWHERE if each not in REPEATED], EVERYWHERE))
def test_the_update_is_that_of_the_unsharded_model(row: Row, kind: str, world: int) -> None:
    """With clipping, two param groups, tied weights, frozen parameters, an all-zero one, one that is used on some steps
    only, and shards that are uneven or empty."""
    (expected,) = trained(unsharded(kind), 0)
    for rank, result in enumerate(trained(kind, world)):
        for dtype, tolerance in TOLERANCE.items():
            error = distance(result[row.name][dtype], expected[row.name][dtype])
            assert error < tolerance, (rank, dtype)


@every_row
@pytest.mark.parametrize("kind", ["replicated", *MODELS])
def test_the_update_is_large_enough_to_be_wrong(row: Row, kind: str) -> None:
    """Each trained parameter of the test above changes by more than a percent; frozen ones do not."""
    model = whole(kind)
    end = trained(kind, 0)[0][row.name][torch.float64]
    moved = {name: distance([after], [p]) for after, (name, p) in zip(end, model.named_parameters())}
    assert {name for name, by in moved.items() if by == 0.0} == {name for name in moved if "frozen" in name}
    assert min(by for by in moved.values() if by) > 0.01


# A layout that is bound: a flat partition, as DeepSpeed's, that cuts layers anywhere.


def train_flat(row: Row) -> list[Tensor]:
    """Each rank updates its part of one flat vector of all layers, of which it knows the segments only."""
    layers = initial((3, 5), (4,), (), (2, 6), (7,))
    flat = torch.cat([p.view(-1) for p in layers])
    rank, world = dist.get_rank(), dist.get_world_size()
    ends = [round(i * flat.numel() / world) for i in range(world + 1)]
    start, stop = ends[rank], ends[rank + 1]
    part = flat[start:stop].clone().requires_grad_()
    segments, at = [], 0
    for i, p in enumerate(layers):
        low, high = max(at, start), min(at + p.numel(), stop)
        if low < high:
            segments.append(Segment(i, low - start, high - low, low - at))
        at += p.numel()
    group = mesh((world,), ("shard",)).get_group()
    opt = row.make([part])
    opt.bind(
        ShardLayout({part: tuple(segments)}, tuple(torch.zeros(p.shape) for p in layers), part.device, groups=(group,))
    )
    for step in range(STEPS):
        whole = [t.view(p.shape).requires_grad_() for t, p in zip(flat.split([p.numel() for p in layers]), layers)]
        pull(whole, step).backward()
        part.grad = torch.cat([p.grad.view(-1) for p in whole])[start:stop]
        opt.step()
        flat = torch.cat([t.detach() for t in gathered(part, ends)])
    return [t.view(p.shape) for t, p in zip(flat.split([p.numel() for p in layers]), layers)]


def gathered(part: Tensor, ends: list[int]) -> list[Tensor]:
    parts = [torch.zeros(stop - start, dtype=part.dtype) for start, stop in itertools.pairwise(ends)]
    for rank, other in enumerate(parts):
        if rank == dist.get_rank():
            other.copy_(part.detach())
        dist.broadcast(other, rank)
    return parts


@every_row_of_elements
@pytest.mark.parametrize("world", some([4], [2, 4]))
def test_a_bound_partition_is_updated_layer_by_layer(row: Row, world: int) -> None:
    params = [p.requires_grad_() for p in initial((3, 5), (4,), (), (2, 6), (7,))]
    opt = row.make(params)
    if row.per_layer:
        with pytest.raises(RankError, match="has a state for each layer, and the layout flat partitions of many"):
            run(world, train_flat, row)
        return
    for step in range(STEPS):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
    for result in run(world, train_flat, row):
        assert distance(result, params) < TOLERANCE[torch.float64]


# State.


def state_after(row: Row, kind: str) -> list[tuple[str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]]]:
    """The names of each parameter's state, after a step in which some parameters had no gradient."""
    model = sharded(kind, torch.float32)
    opt = row.make([p for p in model.parameters() if p.requires_grad])
    assert not opt.state  # engines replace parameters after construction
    backward(model, kind, step=1)
    assert model.seldom.weight.grad is None
    opt.step()
    for p in model.parameters():
        for name, value in opt.state[p].items() if p in opt.state else ():
            if name in row.counts:
                continue
            slot = opt.rule(opt.param_groups[0]).slot(name, p.shape)
            assert value.shape == slot.shape
            if slot.replicated:
                assert not hasattr(value, "placements")
                continue
            assert getattr(value, "placements", None) == getattr(p, "placements", None)
            assert local(value).shape == local(p).shape
    return [(name, sorted(opt.state[p])) for name, p in model.named_parameters() if p in opt.state]


@every_row
@pytest.mark.parametrize(("kind", "world"), [("replicated", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_every_rank_has_the_same_keys(row: Row, kind: str, world: int) -> None:
    """One for each trainable parameter, with or without gradient or shard; checkpoints are by key."""
    params = [(name, p) for name, p in whole(kind, torch.float32).named_parameters() if p.requires_grad]
    expected = [(name, sorted(row.names(p.shape))) for name, p in params]
    assert run(world, state_after, row, kind) == [expected] * world


@every_row
def test_state_can_be_made_before_the_first_step(row: Row) -> None:
    params = initial((3, 2), (4,))
    params[0].requires_grad_()
    opt = row.make(params)
    opt.init_state()
    assert list(opt.state) == params[:1]
    before = {name: value.clone() for name, value in opt.state[params[0]].items()}
    opt.init_state()
    assert all(torch.equal(before[name], value) for name, value in opt.state[params[0]].items())
    assert before["step"].item() == 0.0
    first = 0.1 if row.cls is Adagrad else 0.0
    start = dict.fromkeys(("z", "p0"), params[0].detach())  # these start at the weights
    assert all((value == start.get(name, first)).all() for name, value in before.items() if name != "step")


@every_row
def test_no_step_leaves_its_count_in_place(row: Row) -> None:
    """DeepSpeed's stage-3 loading shares one `step` among partitions: counted in place it would count for all."""
    shared = torch.tensor(3.0)
    params = [p.requires_grad_() for p in initial((3, 2), (2, 3))]
    opt = row.make(params)
    opt.init_state()
    for p in params:
        opt.state[p]["step"] = shared
        p.grad = torch.ones_like(p)
    opt.step()
    assert shared.item() == 3.0
    assert [opt.state[p]["step"].item() for p in params] == [4.0, 4.0]
    assert all(opt.state[p]["step"].device.type == "cpu" for p in params)


def test_a_parameter_frozen_after_its_gradient_steps_as_in_torch() -> None:
    """It had no state and no layer then: the step raised KeyError."""
    ours, theirs = ([p.requires_grad_() for p in initial((3, 2), (4,))] for _ in range(2))
    for params, opt in (
        (ours, SGD(ours, lr=0.1, momentum=0.9)),
        (theirs, torch.optim.SGD(theirs, lr=0.1, momentum=0.9)),
    ):
        pull(params, 0).backward()
        params[0].requires_grad_(False)
        distopt.clip_grad_norm_(opt, math.inf)
        opt.step()
        opt.zero_grad()
        opt.step()
    assert distance(ours, theirs) < 1e-14


# Parameters that are replaced.


def replace(opt: torch.optim.Optimizer, new: Callable[[Tensor], Tensor]) -> list[Tensor]:
    for group in opt.param_groups:
        group["params"] = [nn.Parameter(new(p.detach())) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    return [p for group in opt.param_groups for p in group["params"]]


@every_row_of_elements
@pytest.mark.parametrize("use", ["step", "clip", "perturb"])
def test_plain_tensors_without_a_layout_are_refused(row: Row, use: str) -> None:
    """DeepSpeed puts its flat partitions into the groups: each would count as a layer."""
    opt = row.make(initial((4, 2), (3,)))
    params = replace(opt, lambda p: p.reshape(-1)[:2].clone())
    do = {"step": opt.step, "clip": lambda: distopt.clip_grad_norm_(opt, 1.0), "perturb": distopt.SAM(opt).perturb}
    with pytest.raises(ValueError, match=r"2 parameters .*by plain tensors.*call optimizer\.bind\(layout\)"):
        do[use]()
    opt.bind(ShardLayout({p: (Segment(i, 0, 2),) for i, p in enumerate(params)}, tuple(params), params[0].device))
    do[use]()


def test_a_copied_optimizer_knows_its_parameters() -> None:
    """Unpickled, it accepted any plain tensors as layers."""
    opt = pickle.loads(pickle.dumps(LAMB(initial((4, 2)))))
    replace(opt, lambda p: p.clone())
    with pytest.raises(ValueError, match=r"call optimizer\.bind"):
        opt.step()


def swapped_for_dtensors() -> list[list[Tensor]]:
    """As Accelerate does: optimizer first, then fully_shard, then the new parameters put into the groups."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for late in (False, True):
        model = whole("fsdp2", torch.float64)
        params = [p for p in model.parameters() if p.requires_grad]
        opt = named("lamb").make(params if late else [torch.zeros(1)])
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        fully_shard(model, mesh=mesh((2,), ("shard",)))
        opt.param_groups[0]["params"] = [model.get_parameter(name) for name in names]
        for step in range(3):
            opt.zero_grad()
            backward(model, "fsdp2", step)
            opt.step()
        results.append(full(model))
    return results


def test_parameters_may_become_dtensors_after_construction() -> None:
    for early, late in run(2, swapped_for_dtensors):
        assert all(torch.equal(a, b) for a, b in zip(early, late))
        assert not any(torch.equal(a, b) for a, b in zip(early[:3], whole("fsdp2").parameters()))


def grown() -> list[int]:
    """The layout before and after parameters were added, as for a new head."""
    model = sharded("fsdp2")
    params = list(model.part.parameters())
    opt = named("lamb").make(params[:2])
    first = len(opt.layout.segments)
    opt.add_param_group({"params": params[2:5]})
    return [first, len(opt.layout.segments), opt.layout.num_layers]


def test_the_layout_follows_the_groups() -> None:
    assert run(2, grown) == [[2, 5, 5]] * 2


def different_gradients() -> None:
    (p,) = initial((2, 2))
    p.grad = torch.ones_like(p) * math.nan if dist.get_rank() else torch.ones_like(p)
    opt = named("adamw").make([p])
    distopt.prove_every(opt, steps=0)  # it would raise on both ranks
    opt.step()
    raise RuntimeError(f"{torch.isfinite(p).all()}")


def test_an_error_on_ranks_reaches_the_test() -> None:
    """An error on the tests' own ranks is not lost."""
    with pytest.raises(RankError, match=r"RuntimeError: (True|False)") as error:
        run(2, different_gradients)
    assert error.value.kind == "RuntimeError"
