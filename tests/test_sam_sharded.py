"""SAM on every layout."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt import SAM
from distopt.layout import local
from tests.harness.distributed import run
from tests.harness.optimizers import distance, named
from tests.harness.sam_closures import RHO, STEPS
from tests.harness.sharded import EVERYWHERE, Fleet, backward, bind, full, shard, sharded, unsharded, whole

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
    (expected,) = trained(unsharded(kind), 0)
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
