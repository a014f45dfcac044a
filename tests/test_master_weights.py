"""bfloat16 weights without float32 masters: with remainders, or rounded at random; the same on every layout."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import distopt
from distopt.engine import Zero1
from distopt.kernels import rounding
from distopt.plan.footprint import Param
from distopt.plan.memory import footprint
from tests.harness.bits import WORLDS, full, optimized, trained, way
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.optimizers import ROWS
from tests.harness.states import make, train

LOW = torch.bfloat16
FORMS = {"float32": "master", "remainder": "remainder", "none": ""}
# Without masters.
FREE = [row.name for row in ROWS if not row.cls.needs_float32 and not row.kwargs.get("cautious")]
SMALL = ["adamw", "rmsprop_centered_momentum", "lamb", "lars", "lion"]


def patterns() -> Tensor:
    """Float32 numbers with all kinds of bits, and those at the edges of a format."""
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    edges = [0, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x8000, 0x7FFF, 0x18000, 0x28000, 0x3F808000]
    edges += [edge - 2**31 for edge in edges]
    return torch.cat([bits, torch.tensor(edges)]).to(torch.int32).view(torch.float32)


def test_a_weight_and_its_remainder_are_every_float32_number() -> None:
    values = patterns()
    high, low = rounding.split(values)
    joined = rounding.join(high, low)
    assert torch.equal(joined.view(torch.int32)[~values.isnan()], values.view(torch.int32)[~values.isnan()])
    assert torch.equal(values.isnan(), joined.isnan()) and torch.equal(values.isnan(), high.isnan())
    real = values[values.isfinite()]
    nearest = real.to(LOW)
    beside = rounding.join(nearest, rounding.remainders_of(nearest, real))
    assert (beside.view(torch.int32) - real.view(torch.int32)).abs().max() <= 1
    assert torch.equal(rounding.masters_of(*rounding.split(real)).to(LOW), rounding.split(real)[0])


def test_a_number_is_rounded_to_one_of_its_neighbours_and_right_in_the_mean() -> None:
    """2^16 throws: five standard deviations of their mean are 0.01 of a unit."""
    unit, count = 2.0**-7, 2**16
    for share in (0.0, 0.1, 0.5, 0.9):
        found = rounding.at_random(torch.full((count,), 1.0 + share * unit), rounding.key_of(7), torch.arange(count))
        assert {*((found.float() - 1.0) / unit).tolist()} == ({0.0, 1.0} if share else {0.0})
        assert abs(float((found.float() - 1.0).mean()) / unit - share) < 0.01
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    assert torch.equal(rounding.at_random(special, 1, torch.arange(4)).nan_to_num(7.0), special.to(LOW).nan_to_num(7.0))


@pytest.mark.parametrize("by", ["kernels", "rules"])
def test_remainders_have_the_bits_of_masters(by: str) -> None:
    """Of weights and state, for every rule, with its trust ratios and in both ways."""
    with way(by):
        for name in FREE if by == "kernels" else SMALL:
            _, params, masters = optimized("ddp", name, LOW)
            _, others, remainders = optimized("ddp", name, LOW, master_weights="remainder")
            for p, q in zip(params, others):
                state, other = masters.state[p], remainders.state[q]
                assert torch.equal(state["master"], rounding.join(q.detach(), other["remainder"])), name
                assert state.keys() - {"master"} == other.keys() - {"remainder"}
                assert all(torch.equal(state[key], other[key]) for key in state if key != "master"), name


def test_kernels_round_as_the_reference_does() -> None:
    """p - g has one rounding in float32, so that all that could differ is that to bfloat16."""
    found = []
    for by in ("kernels", "rules"):
        numbers = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(s, generator=numbers).to(LOW)) for s in ((97, 89), (3, 9000), (5,), ())]
        optimizer = distopt.SGD(params, lr=1.0, master_weights="none")
        with way(by):
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=numbers).mul(1e-3).to(LOW)
                optimizer.step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


def rounded(kind: str, by: str, form: str) -> dict[str, list[Tensor]]:
    jobs = ["adamw", "lion"] if kind == "columns" else SMALL  # a norm's sum is the same bits in rows only
    with way(by):
        found = {job: trained(kind, job, LOW, master_weights=form) for job in jobs}
    return found if not dist.is_initialized() or dist.get_rank() == 0 else {}


QUICK = [(kind, 2, "kernels", "none") for kind in ("zero1", "fsdp2", "columns")]
QUICK += [("buckets", 2, "rules", "none"), ("buckets", 2, "kernels", "remainder")]
EVERY = [
    (kind, world, by, form)
    for kind, world in [*WORLDS, ("columns", 2), ("columns", 4)]
    for by in ("kernels", "rules")
    for form in ("none", "remainder")
]


@pytest.mark.parametrize(("kind", "world", "by", "form"), some(QUICK, EVERY))
def test_the_same_bits_on_every_layout(kind: str, world: int, by: str, form: str) -> None:
    (found, *_) = run(world, rounded, kind, by, form)
    expected = rounded("ddp", by, form)
    for job in found:
        tensors = expected[job]
        assert [i for i, (a, b) in enumerate(zip(found[job], tensors, strict=True)) if not same(a, b)] == [], job


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bits; a remainder may look like nan."""
    return torch.equal(*(t.view(torch.int16) if t.dtype is LOW else t for t in (a, b)))


def steps(model: nn.Module, optimizer: distopt.ShardedOptimizer) -> None:
    for step in range(3):
        for i, p in enumerate(model.all):
            numbers = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(LOW)
            placed = hasattr(p, "placements")
            p.grad = distribute_tensor(numbers, p.device_mesh, p.placements, src_data_rank=None) if placed else numbers
        optimizer.step()


def run_of(kind: str, form: str, folder: Any, saves: bool) -> list[Tensor]:
    model, optimizer = make(kind, LOW, partial(distopt.AdamW, master_weights=form))
    if saves:
        steps(model, optimizer)
        distopt.save_checkpoint(folder, model, optimizer)
    else:
        distopt.load_checkpoint(folder, model, optimizer)
    steps(model, optimizer)
    return [full(p) for p in model.all]


@pytest.mark.parametrize("world", some([2], [1, 2, 3]))
def test_a_run_in_buckets_that_was_saved_at_2_continues(world: int, tmp_path: Any) -> None:
    """Their checkpoints have the float32 weights in the place of weights and remainders."""
    (whole, _) = run(2, run_of, "buckets", "remainder", tmp_path / "saved", True)
    found = run(world, run_of, "buckets", "remainder", tmp_path / "saved", False)[0]
    assert all(map(torch.equal, found, whole))


@pytest.mark.parametrize(
    ("kind", "world"), some([("plain", 1)], [("plain", 1), ("zero1", 1), ("fsdp2", 3), ("zero1", 3)])
)
@pytest.mark.parametrize("form", ["remainder", "none"])
def test_a_run_that_was_saved_at_2_continues_elsewhere(form: str, kind: str, world: int, tmp_path: Any) -> None:
    (whole, _) = run(2, run_of, "fsdp2", form, tmp_path / "saved", True)
    found = run(world, run_of, kind, form, tmp_path / "saved", False)[0]
    assert all(map(torch.equal, found, whole))


def small_steps(**options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    weight = nn.Parameter(torch.full((64, 64), 0.999, dtype=LOW))
    optimizer = distopt.SGD([weight], lr=1e-5, **options)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_small_steps_are_not_lost() -> None:
    """A step is 1/400 of a unit in the last place: rounded to the nearest, none would ever move a weight."""
    start = float(torch.tensor(0.999, dtype=LOW))
    _, state = small_steps()
    weight, beside = small_steps(master_weights="remainder")
    assert torch.equal(rounding.join(weight, beside["remainder"]), state["master"])
    assert state["master"].mean().item() == pytest.approx(start - 100e-5, abs=1e-5)
    weight, beside = small_steps(master_weights="none")
    assert sorted(beside) == ["step"]
    assert weight.float().mean().item() == pytest.approx(start - 100e-5, abs=2e-4)  # five standard deviations


def test_each_form_is_made_from_another() -> None:
    """Loaded into an optimizer of another form, values keep all their bits, but for the last one of ties."""
    model, optimizer = make("plain", LOW, distopt.AdamW)
    train(model, optimizer)
    masters = [optimizer.state[p]["master"].clone() for p in model.all]
    for form in ("remainder", "float32", "remainder", "none", "float32"):
        other = distopt.AdamW(model.parameters(), lr=0.01, master_weights=form)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.init_state()
        assert all(group["master_weights"] == form for group in other.param_groups)
        optimizer = other
        for p, master in zip(model.all, masters):
            state = optimizer.state[p]
            assert state.keys() & {"master", "remainder"} == {FORMS[form]} - {""}
            if form == "remainder":
                assert torch.allclose(rounding.join(p.detach(), state["remainder"]), master, rtol=2**-23, atol=0.0)
    assert all(torch.equal(optimizer.state[p]["master"], p.detach().float()) for p in model.all)


def test_a_weight_that_was_set_to_zero_is_zero() -> None:
    weight = nn.Parameter(torch.full((4,), 1.0, dtype=LOW))
    optimizer = distopt.SGD([weight], lr=2.0**-10, master_weights="remainder")
    weight.grad = torch.tensor([1.0, -1.0, 3.0, -3.0], dtype=LOW)
    optimizer.step()
    with torch.no_grad():
        weight.zero_()
    weight.grad.zero_()
    optimizer.step()
    assert weight.abs().max() < 2.0**-100


@pytest.mark.parametrize(
    ("optimizer", "options", "dtype", "said"),
    [
        (distopt.AdamW, {"master_weights": "bf16"}, LOW, "one of float32, remainder, none"),
        (distopt.AdamW, {"master_weights": "none"}, torch.float16, "torch.float16"),
        (distopt.AdamW, {"master_weights": "none", "cautious": True}, LOW, "cautious=True"),
        (distopt.AdamW, {"master_weights": "remainder", "capturable": True}, LOW, "capturable=True"),
        (distopt.Prodigy, {"master_weights": "none"}, LOW, "Prodigy measures distances"),
        (distopt.AdamWScheduleFree, {"master_weights": "none"}, LOW, "AdamWScheduleFree interpolates"),
        (distopt.Adafactor, {"master_weights": "remainder"}, LOW, "Adafactor compares"),
    ],
)
def test_what_cannot_be_is_refused(optimizer: Any, options: Any, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optimizer([nn.Parameter(torch.zeros(2, dtype=dtype))], lr=0.1, **options)


def test_the_plan_counts_what_stands_beside_a_weight() -> None:
    numel, engine = 1024 * 512, Zero1(param_dtype="bf16")
    for beside in (4, 2, 0):
        planned = footprint(engine, [[Param((1024, 512), True, 2, beside=beside)]], 2)
        assert planned.state == numel // 2 * (4 + 4 + beside)
