"""Prodigy and D-Adaptation: one step size for all layers, from sums over full layers, equal on all ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.engine.train_step import update
from tests.harness import accelerated, matrix, oracles
from tests.harness.distributed import run
from tests.harness.engines import CPU, ENGINES, full
from tests.harness.optimizers import distance, initial, named, pull
from tests.harness.sharded import full as gathered
from tests.harness.sharded import whole
from tests.test_rules import leaves, trajectory

NAMES = ("prodigy", "dadapt_adam", "dadapt_sgd")
every_name = pytest.mark.parametrize("name", NAMES)
STEPS = 6


def d_of(opt: torch.optim.Optimizer) -> float:
    (d,) = {float(group["d"]) for group in opt.param_groups}  # the same in every group
    return d


@every_name
def test_d_grows_from_a_millionth_to_the_distance(name: str) -> None:
    """As the papers promise of a quadratic: d ends at the order of the largest distance, whatever it started from."""
    for d0 in (1e-8, 1e-4):
        p = torch.zeros(30, dtype=torch.float64, requires_grad=True)
        opt = named(name).cls([p], d0=d0)
        seen = []
        for _ in range(200):
            p.grad = p.detach() - 2.0
            opt.step()
            seen.append(d_of(opt))
        assert seen == sorted(seen)
        assert 0.2 < seen[-1] < 10.0
        assert (p - 2.0).abs().max() < 0.1


@every_name
def test_the_default_start_is_that_of_the_oracle(name: str) -> None:
    """In float64: in float32 the differences of the first steps, of 1e-6, are a few roundings."""
    row, params = named(name), leaves()
    oracle = {"prodigy": oracles.prodigy, "dadapt_adam": oracles.dadapt_adam, "dadapt_sgd": oracles.dadapt_sgd}[name]
    expected = oracle(params, oracles.gradient_of(pull), 20, lr=1.0)
    for ours, theirs in zip(trajectory(row.cls(params), params, 20), expected):
        assert distance(ours, theirs) < 1e-9  # of 1e-6, too, a rounding is 1e-10


@every_name
def test_a_zero_gradient_leaves_d(name: str) -> None:
    p = torch.ones(3, requires_grad=True)
    opt = named(name).cls([p])
    p.grad = torch.zeros(3)
    opt.step()
    assert d_of(opt) == 1e-6
    assert torch.equal(p.detach(), torch.ones(3))


@every_name
def test_what_one_step_size_cannot_serve_is_refused(name: str) -> None:
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    cls = named(name).cls
    with pytest.raises(ValueError, match=r"lr 1\.0 and 0\.5, and .* has one step size for all"):
        cls([{"params": [first]}, {"params": [second], "lr": 0.5}])
    with pytest.raises(ValueError, match="trust_ratio=True: the ratio would cancel"):
        cls([first], trust_ratio=True)
    with pytest.raises(ValueError, match="d0 must be a number > 0, got 0"):
        cls([first], d0=0.0)
    opt = cls([{"params": [first]}, {"params": [second], "weight_decay": 0.1}])
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    opt.param_groups[1]["lr"] = 0.5  # as a schedule with one function for each group
    with pytest.raises(ValueError, match=r"lr 1\.0 and 0\.5"):
        opt.step()
    assert "d" not in opt.state[first] and opt.param_groups[0]["d"] is None


@every_name
def test_a_group_added_later_has_the_same_d(name: str) -> None:
    first, second = initial((4, 3), (3,))
    opt = named(name).make([first.requires_grad_()])
    first.grad = first.detach() - 2.0
    opt.step()
    opt.add_param_group({"params": [second.requires_grad_()]})
    second.grad = second.detach() - 2.0
    assert d_of(opt) > 0.0
    opt.step()
    assert d_of(opt) > 0.0


def sharded_run(kind: str, name: str) -> tuple[list[Tensor], list[float]]:
    """The full weights and every d, with gradients that are equal on all ranks."""
    model = nn.ParameterList([nn.Parameter(p) for p in initial((97, 8), (5, 3), (7,), (1,), dtype=torch.float32)])
    if kind == "fsdp2":
        fully_shard(model)
    params = [*model.parameters()]
    opt = named(name).make(params)
    if kind == "zero1":
        opt.bind(distopt.layout.zero1_layout(model))
    found = []
    for step in range(STEPS):
        for i, p in enumerate(params):
            numbers = torch.Generator().manual_seed(10 * step + i)
            p.grad = distribute(torch.randn(p.shape, generator=numbers) + 1.0, p)
        opt.step()
        found.append(d_of(opt))
    return [p.full_tensor().detach() if hasattr(p, "placements") else p.detach() for p in params], found


def distribute(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "placements"):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


@every_name
@pytest.mark.parametrize(("kind", "world"), [("zero1", 2), ("fsdp2", 4)])
def test_d_is_the_same_bits_on_every_rank_and_at_every_number_of_ranks(kind: str, world: int, name: str) -> None:
    expected, steps = sharded_run("plain", name)
    assert steps[-1] > steps[0]
    for weights, found in run(world, sharded_run, kind, name):
        assert found == steps
        assert all(torch.equal(p, q) for p, q in zip(weights, expected, strict=True))


# Checkpoints.


def half(path: Path, kind: str, name: str, load: bool) -> tuple[list[Tensor], float]:
    """Steps 0 to 3 and a save, or a load of it and steps 3 to 6."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model: nn.Module = whole("replicated")
    if kind == "fsdp2":
        fully_shard(model)
    elif kind == "zero1":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    row = named(name)
    opt = row.make(row.groups([*model.parameters()]))
    if kind == "zero1":
        opt.bind(distopt.layout.zero1_layout(model))
    if load:
        distopt.load_checkpoint(path, model, opt)
    for step in range(3, 6) if load else range(3):
        opt.zero_grad()
        model(accelerated.batch(3 * step).chunk(world)[rank], 3 * step).backward()
        opt.step()
    if not load:
        distopt.save_checkpoint(path, model, opt)
    return gathered(model), d_of(opt)


@every_name
@pytest.mark.parametrize(("here", "there"), [(("zero1", 2), ("plain", 1)), (("fsdp2", 2), ("zero1", 4))], ids=str)
def test_a_checkpoint_continues_anywhere_with_its_d(
    name: str, here: tuple[str, int], there: tuple[str, int], tmp_path: Path
) -> None:
    def on(where: tuple[str, int], folder: Path, load: bool) -> tuple[list[Tensor], float]:
        arguments = folder, where[0], name, load
        return half(*arguments) if where[1] < 2 else run(where[1], half, *arguments)[0]

    on(here, tmp_path / "sharded", False)
    on(("plain", 1), tmp_path / "plain", False)
    expected, d = on(("plain", 1), tmp_path / "plain", True)
    weights, found = on(there, tmp_path / "sharded", True)
    # float64, and other orders of sums over samples, which d takes on.
    assert distance(weights, expected) < 1e-12
    assert found == pytest.approx(d, rel=1e-12)


# DeepSpeed.


def through_deepspeed(kind: str, name: str, groups: int) -> list[Tensor] | str:
    engine = ENGINES[kind](precision="fp32")
    toy = matrix.initial("fp32")
    model = engine.build(toy, [toy.part], lambda unit, device: None, CPU)
    params = [p for p in engine.unwrap(model).parameters() if p.requires_grad]
    opt = named(name).make([{"params": params[i::groups]} for i in range(groups)])
    try:
        model = engine.attach(model, opt, 1, matrix.MAX_NORM)
    except ValueError as error:
        return str(error)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(1, STEPS + 1):
        mine = matrix.batch(3 * step, torch.float32).chunk(world)[rank]
        assert update(engine, model, opt, [mine], matrix.MAX_NORM, partial(matrix.loss, 3 * step)).applied
    found = list(full(model).values())
    model.destroy()
    return found


@every_name
@pytest.mark.parametrize("kind", ["deepspeed_zero1", "deepspeed_zero3"])
def test_deepspeed_has_one_partition_or_is_refused(kind: str, name: str) -> None:
    answers = run(2, through_deepspeed, kind, name, 2)
    assert len({str(answer) for answer in answers}) == 1
    assert "needs all layers in one call of step()" in str(answers[0])
    model = matrix.initial("fp32")
    opt = named(name).make([p for p in model.parameters() if p.requires_grad])
    for step in range(1, STEPS + 1):
        opt.zero_grad()
        model(matrix.batch(3 * step, torch.float32), 3 * step).backward()
        distopt.clip_grad_norm_(opt, matrix.MAX_NORM)
        opt.step()
    expected = [p.detach() for p in model.parameters()]
    for weights in run(2, through_deepspeed, kind, name, 1):
        assert not isinstance(weights, str), weights
        assert distance(weights, expected) < 1e-5  # float32: the order of sums, stretched by Adam's quotient
