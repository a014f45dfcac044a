"""SAM: the paper's two passes around any torch optimizer, on every layout, and weights that come back bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distopt
from distopt import SAM
from distopt.layout import local
from tests.harness import oracles
from tests.harness.distributed import run
from tests.harness.optimizers import Row, distance, every_row, initial, named, pull
from tests.harness.sharded import EVERYWHERE, Fleet, backward, bind, full, shard, sharded, whole

RHO = 0.4
STEPS = 6  # moments, their bias corrections and ratios are all there after a few


def closure_of(opt: torch.optim.Optimizer, params: list[Tensor], step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = pull(params, step)
        loss.backward()
        return loss

    return closure


def by_closure(sam: SAM, params: list[Tensor], step: int) -> Tensor:
    return sam.step(closure_of(sam, params, step))


def by_verbs(sam: SAM, params: list[Tensor], step: int) -> Tensor:
    sam.zero_grad()
    loss = pull(params, step)
    loss.backward()
    sam.perturb()
    sam.zero_grad()
    pull(params, step).backward()
    sam.restore()
    sam.step()
    return loss


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [*initial((), (7,), (5, 3), (4, 6), dtype=dtype), torch.zeros(4, 3, dtype=dtype)]
    return [t.requires_grad_() for t in [*tensors, initial((3, 4), dtype=dtype)[0].t()]]


# The paper's step.


@every_row
@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"), [(by_closure, torch.float64, 1e-13), (by_verbs, torch.float32, 1e-5)]
)
def test_every_step_equals_the_oracle(
    row: Row, way: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Two groups, one norm over both; the loss that is returned is that at the unperturbed weights."""
    params = leaves(dtype)
    grad = oracles.gradient_of(pull)
    expected = row.expected(params, oracles.sam(grad, RHO), STEPS)
    sam = SAM(row.make(row.groups(params)), RHO)
    for step in range(STEPS):
        loss = pull(params, step).item()
        assert way(sam, params, step).item() == loss
        error = distance([p.detach() for p in params], expected[step])
        assert error < tolerance, step


@pytest.mark.parametrize("way", [by_closure, by_verbs])
def test_the_optimizer_may_be_torchs(way: Callable[..., Tensor]) -> None:
    params = leaves()
    row = named("momentum")
    expected = row.expected(params, oracles.sam(oracles.gradient_of(pull), RHO), STEPS)
    sam = SAM(row.make_peer(row.groups(params)), RHO)
    for step in range(STEPS):
        way(sam, params, step)
    assert distance([p.detach() for p in params], expected[-1]) < 1e-13


def test_the_perturbation_has_length_rho_along_the_gradient() -> None:
    params = leaves()
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.AdamW(params), RHO)
    pull(params, 0).backward()
    norm = sam.perturb()
    moved = [p.detach() - b for p, b in zip(params, before)]
    assert norm.item() == pytest.approx(math.hypot(*[p.grad.norm().item() for p in params]), rel=1e-15)
    assert math.hypot(*[m.norm().item() for m in moved]) == pytest.approx(RHO, rel=1e-14)
    assert distance(moved, [p.grad * (RHO / norm) for p in params]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_restored_bit_for_bit(dtype: torch.dtype) -> None:
    """Subtracting the perturbation would round."""
    params = leaves(dtype)
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.SGD(params), rho=3.0)
    pull(params, 0).backward()
    sam.perturb()
    assert not any(torch.equal(p, b) for p, b in zip(params, before))
    sam.restore()
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    sam.restore()  # does nothing
    assert all(torch.equal(p, b) for p, b in zip(params, before))


def test_a_zero_gradient_perturbs_nothing() -> None:
    params = leaves()
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.SGD(params))
    for p in params:
        p.grad = torch.zeros_like(p)
    assert sam.perturb().item() == 0.0
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    sam.restore()
    sam.zero_grad()
    assert sam.perturb().item() == 0.0  # no gradients at all


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned_and_can_be_restored(value: float) -> None:
    params = leaves()
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.SGD(params))
    pull(params, 0).backward()
    params[2].grad[0, 0] = value
    assert not math.isfinite(sam.perturb().item())
    sam.restore()
    assert all(torch.equal(p, b) for p, b in zip(params, before))


def test_a_bfloat16_neighbour_costs_a_float32_layer_no_accuracy() -> None:
    """The scale took the dtype of the first gradient: 8 bits for all."""
    (high,) = initial((60,), dtype=torch.float32)
    low = torch.ones(50, dtype=torch.bfloat16)
    before = high.clone()
    for p in (low, high):
        p.requires_grad_().grad = torch.full_like(p, 0.7)
    total = SAM(distopt.SGD([low, high]), rho=1.0).perturb().item()
    assert distance([high.detach() - before], [high.grad / total]) < 1e-6


@pytest.mark.parametrize("bad", [0.0, 0, -0.1, math.inf, math.nan, True, "0.05", None, torch.tensor(0.1)], ids=repr)
def test_bad_rho_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"rho must be a number > 0, got .*leave SAM out for rho = 0"):
        SAM(distopt.SGD(leaves()), bad)


class Peak(TorchDispatchMode):
    """The most bytes that were held at a time in storages made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            address = t.untyped_storage().data_ptr() if isinstance(t, Tensor) else None
            if address is not None and address not in old | self.held.keys():
                self.held[address] = t.untyped_storage().nbytes()
                weakref.finalize(t, self.held.pop, address, None)
        self.peak = max(self.peak, sum(self.held.values()))
        return result


def test_a_perturbation_costs_one_copy_of_the_weights_and_no_more() -> None:
    """It was two for as long as it took: the move was a tensor of its own."""
    params = [torch.randn(400, 300).requires_grad_(), torch.randn(200, 500).requires_grad_()]
    for p in params:
        p.grad = torch.randn_like(p)
    sam = SAM(distopt.SGD(params))
    with Peak() as memory:
        sam.perturb()
    copy = sum(p.numel() * p.element_size() for p in params)
    assert copy <= memory.peak < 1.05 * copy  # and a norm of every 256 elements
    assert sum(memory.held.values()) == pytest.approx(copy, rel=1e-3)


def test_perturbing_twice_is_refused() -> None:
    """The copy would be of perturbed weights, and they would never come back."""
    params = leaves()
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.SGD(params))
    pull(params, 0).backward()
    sam.perturb()
    with pytest.raises(RuntimeError, match=r"perturb\(\) was called twice without restore\(\)"):
        sam.perturb()
    sam.restore()
    assert all(torch.equal(p, b) for p, b in zip(params, before))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_raises_leaves_the_weights_as_they_were(failing: int) -> None:
    params = leaves()
    before = [p.detach().clone() for p in params]
    sam = SAM(distopt.SGD(params, momentum=0.9))
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return closure_of(sam, params, 0)()

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    assert not sam.state
    by_closure(sam, params, 0)  # and continues
    assert not any(torch.equal(p, b) for p, b in zip(params, before))


# One optimizer to everybody else.


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": partial(CosineAnnealingLR, T_max=5),
    "one cycle": partial(OneCycleLR, max_lr=2.0, total_steps=9),
    "plateau": partial(ReduceLROnPlateau, patience=0, factor=0.5),
    "in turn": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, 1.0, 2), ExponentialLR(opt, 0.5)], [2]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_schedule_of_torch_over_sam_is_that_over_the_optimizer(schedule: str) -> None:
    """Those too that move momentum, or ask for a loss; rates and weights."""
    runs = []
    for on in ("sam", "inner"):
        params = leaves()
        sam = SAM(torch.optim.SGD(params, lr=1.0, momentum=0.5), RHO)
        moves = SCHEDULES[schedule](sam if on == "sam" else sam.optimizer)
        seen = []
        for step in range(6):
            by_closure(sam, params, step)
            moves.step(*[1.0] * (schedule == "plateau"))
            seen.append((sam.optimizer.param_groups[0]["lr"], sam.optimizer.param_groups[0]["momentum"]))
        runs.append((seen, [p.detach() for p in params]))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) > 2
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_param_groups_and_state_that_are_set_are_the_inners() -> None:
    """DeepSpeed, for one, sets an optimizer's param groups; SAM kept them to itself, and the inner stepped the old."""
    params = leaves()
    sam = SAM(distopt.SGD(params[:2], lr=1.0))
    sam.param_groups = [{**sam.param_groups[0], "params": params[2:4]}]
    sam.state = {}
    assert sam.optimizer.param_groups is sam.param_groups and sam.optimizer.state is sam.state


@pytest.mark.parametrize("on", ["sam", "inner"])
def test_a_schedule_on_either_moves_the_rate(on: str) -> None:
    """SAM with param groups of its own left the inner optimizer at its first rate."""
    params = leaves()
    inner = distopt.SGD(params, lr=1.0)
    sam = SAM(inner)
    assert sam.param_groups is inner.param_groups
    assert sam.state is inner.state
    schedule = LambdaLR(sam if on == "sam" else inner, lambda step: 0.5**step)
    for step in range(3):
        assert [g["lr"] for g in inner.param_groups] == [g["lr"] for g in sam.param_groups] == [0.5**step]
        by_closure(sam, params, step)
        schedule.step()  # torch warns here if it has seen no step of the optimizer


def test_the_state_dict_is_the_inners_and_both_load_it() -> None:
    params, again = leaves(), leaves()
    sam = SAM(named("adamw").make(params), RHO)
    for step in range(3):
        by_closure(sam, params, step)
    assert sam.state_dict().keys() == sam.optimizer.state_dict().keys() == {"state", "param_groups"}
    other = SAM(named("adamw").make(again, lr=9.0), RHO)
    other.load_state_dict(copy.deepcopy(sam.state_dict()))
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    for step in range(3, 6):
        by_closure(sam, params, step)
        by_closure(other, again, step)
    assert all(torch.equal(p, q) for p, q in zip(params, again))
    assert other.optimizer.state[again[0]]["step"].item() == 6.0


def test_groups_and_hooks_are_the_inners() -> None:
    params = leaves()
    sam = SAM(distopt.SGD(params[:3]))
    calls = []
    sam.register_step_post_hook(lambda opt, *_: calls.append(opt))
    sam.add_param_group({"params": params[3:], "lr": 0.7})
    assert [len(g["params"]) for g in sam.optimizer.param_groups] == [3, 3]
    assert sam.defaults is sam.optimizer.defaults
    by_closure(sam, params, 0)
    assert calls == [sam.optimizer]
    sam.zero_grad()
    assert all(p.grad is None for p in params)
    assert isinstance(sam, torch.optim.Optimizer)
    assert repr(sam).startswith("SAM(rho=0.05, optimizer=SGD (")
    with pytest.raises(AttributeError, match="nothing"):
        _ = sam.nothing


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda sam: pickle.loads(pickle.dumps(sam))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_complete(how: Callable[[SAM], SAM]) -> None:
    """It had the inner optimizer's state and no inner optimizer; a schedule, which wraps `step`, was in its way."""
    params = leaves()
    sam = SAM(named("lamb").make(params), RHO)
    LambdaLR(sam, lambda step: 1.0)
    by_closure(sam, params, 0)
    other = how(sam)
    assert other.optimizer is not sam.optimizer and other.param_groups is other.optimizer.param_groups
    again = other.param_groups[0]["params"]
    assert other.rho == RHO
    by_closure(sam, params, 1)
    by_closure(other, again, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, again))


# On every layout.

ROWS = ("nesterov", "adamw", "lamb")


def train(kind: str, world: int) -> dict[str, list[Tensor]]:
    """The full parameters after clipped SAM steps by three optimizers; for world 0 nothing is sharded."""
    models = Fleet({name: whole(kind) for name in ROWS})
    if world:
        shard(kind, models)
    rows = [named(name) for name in ROWS]
    sams = [SAM(row.make(row.groups([*models[row.name].parameters()])), RHO) for row in rows]
    for row, sam in zip(rows, sams):
        bind(kind, sam.optimizer, models[row.name])
    for step in range(STEPS):
        models.zero_grad()
        backward(models, kind, step)
        norms = [sam.perturb() for sam in sams]
        assert all(norm.isfinite() for norm in norms)
        models.zero_grad()
        backward(models, kind, step)
        for sam in sams:
            sam.restore()
            distopt.clip_grad_norm_(sam, max_norm=10.0)
            sam.step()
    params = iter(full(models))
    return {name: [next(params) for _ in models[name].parameters()] for name in ROWS}


@lru_cache
def trained(kind: str, world: int) -> list[dict[str, list[Tensor]]]:
    return run(world, train, kind, world) if world else [train(kind, world)]


@pytest.mark.parametrize(("kind", "world"), [(kind, world) for kind, world in EVERYWHERE if world == 2])
@pytest.mark.parametrize("name", ROWS)
def test_the_update_is_that_of_the_full_model(name: str, kind: str, world: int) -> None:
    """The norm of the perturbation is over all ranks; `tests.test_sam_family` has more of them. The popular restore,
    `p.data = saved`, never reaches a parameter that FSDP2 has sharded: the weights stay perturbed, the loss still
    falls, and the result is that of no algorithm."""
    (expected,) = trained("tp_fsdp" if kind == "tp_fsdp" else "replicated", 0)
    for result in trained(kind, world):
        assert distance(result[name], expected[name]) < 1e-12


def popular_restore() -> list[bool]:
    """Whether the weights that the forward pass uses are back, after each restore."""
    back = []
    for restore in ("popular", "ours"):
        model = sharded("fsdp2")
        before = full(model)
        sam = SAM(distopt.SGD(model.parameters()), RHO)
        backward(model, "fsdp2", 0)
        saved = [p.data.clone() for p in model.parameters()]
        sam.perturb()
        assert not all(torch.equal(a, b) for a, b in zip(full(model), before))
        if restore == "popular":
            for p, value in zip(model.parameters(), saved):
                p.data = value
        else:
            sam.restore()
        back.append(all(torch.equal(a, b) for a, b in zip(full(model), before)))
    return back


def test_the_popular_restore_does_not_reach_fsdp2() -> None:
    """Why `restore` copies. If this fails FSDP2 has changed, and the story above is history."""
    assert run(2, popular_restore) == [[False, True]] * 2


def restored(kind: str) -> bool:
    """Local shards before and after, empty ones too; the copy is as large as they are."""
    model = sharded(kind, torch.float32)
    params = [p for p in model.parameters() if p.requires_grad]
    sam = SAM(distopt.LAMB(params), rho=1.0)
    backward(model, kind, 0)
    before = [local(p).detach().clone() for p in params]
    sam.perturb()
    assert sum(copy.numel() for copy in sam._perturbation.backup.copies) == sum(b.numel() for b in before)
    moved = [not torch.equal(local(p), b) for p, b in zip(params, before) if b.numel()]
    assert all(moved)
    sam.restore()
    return all(torch.equal(local(p), b) for p, b in zip(params, before))


@pytest.mark.parametrize(("kind", "world"), [("replicated", 2), ("fsdp2", 2), ("fsdp2", 4), ("tp_fsdp", 4)])
def test_shards_are_restored_bit_for_bit(kind: str, world: int) -> None:
    assert run(world, restored, kind) == [True] * world


def closure_on(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The closure form and the verbs, on sharded models."""
    results = []
    for way in ("closure", "verbs"):
        model = sharded(kind)
        sam = SAM(named("lamb").make(model.parameters()), RHO)
        for step in range(3):
            one = partial(one_pass, sam, model, kind, step)
            if way == "closure":
                sam.step(one)
            else:
                one()
                sam.perturb()
                one()
                sam.restore()
                sam.step()
        results.append(full(model))
    return tuple(results)


def one_pass(sam: SAM, model: nn.Module, kind: str, step: int) -> Tensor:
    sam.zero_grad()
    return backward(model, kind, step)


@pytest.mark.parametrize(("kind", "world"), [("replicated", 2), ("fsdp2", 4)])
def test_closure_and_verbs_are_one_algorithm(kind: str, world: int) -> None:
    for closure, verbs in run(world, closure_on, kind):
        assert all(torch.equal(a, b) for a, b in zip(closure, verbs))
