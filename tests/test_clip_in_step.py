"""Clipping as an argument of the step: the numbers of clipping first, in one pass and one all-reduce less."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from benchmarks.collectives import Collectives
from distopt.kernels import dispatch
from tests.harness.distributed import run
from tests.harness.optimizers import Row, distance, every_compiled_row, every_row, initial, pull
from tests.harness.sharded import backward, bind, full, sharded

SHAPES = ((97, 89), (9000,), (3, 5), (1,), (0, 4))
MAX_NORM = 1.0


def step(opt: Any, how: str, max_norm: float = MAX_NORM) -> Tensor:
    if how == "before":
        norm = distopt.clip_grad_norm_(opt, max_norm)
        opt.step()
        return norm
    clip = distopt.Clip(opt, max_norm)
    opt.step(clip=clip, consumes_grads=how == "consuming")
    return clip.norm


def train(row: Row, how: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=dtype)]
    opt = row.make(row.groups(params), **options)
    for i in range(3):
        opt.zero_grad()
        pull(params, i).backward()
        before = [p.grad.clone() for p in params]
        assert step(opt, how) > MAX_NORM
        if how == "in the step":
            assert all(torch.equal(p.grad, g) for p, g in zip(params, before))
    return [p.detach() for p in params] + [s for p in params for s in opt.state[p].values()]


@every_row
@pytest.mark.parametrize("how", ["in the step", "consuming"])
def test_weights_and_state_are_those_of_clipping_first(row: Row, how: str) -> None:
    """To the last bit, on the CPU: each product is rounded as if it had been stored. LARS takes |factor g| to be
    factor |g|, one rounding away."""
    for options in ({}, {"maximize": True}):
        found, expected = train(row, how, **options), train(row, "before", **options)
        if row.cls.ratio_of == "gradient":
            assert distance(found, expected) < 1e-6
        else:
            assert all(map(torch.equal, found, expected))


@every_compiled_row
def test_so_are_those_of_the_unfused_fallback(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "fits", lambda shards: [])
    for dtype in (torch.float32, torch.float64):
        found, expected = train(row, "in the step", dtype), train(row, "before", dtype)
        assert distance(found, expected) < (1e-6 if row.cls.ratio_of == "gradient" else 1e-30)


@pytest.mark.parametrize("options", [{"cautious": True}, {"cautious_decay": True}], ids=str)
def test_so_are_those_of_cautious_updates(options: dict[str, Any]) -> None:
    row = Row("lamb", distopt.LAMB, {"lr": 0.1, "weight_decay": 0.1}, lambda *_: [])
    assert all(map(torch.equal, train(row, "in the step", **options), train(row, "before", **options)))


def test_gradients_of_16_bits_are_rounded_once() -> None:
    """Clipping first would round factor and product to 8 bits; the step widens a gradient before it multiplies."""
    grads = [torch.randn(40, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.ones(3).bfloat16()]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        params = [torch.ones(g.shape, dtype=dtype).requires_grad_() for g in grads]
        opt = distopt.SGD(params, lr=0.1, momentum=0.9)
        for p, g in zip(params, grads):
            p.grad = g.to(dtype)
        opt.step(clip=distopt.Clip(opt, 0.7))
        results.append([opt.state[p]["momentum_buffer"] for p in params])
    assert all(map(torch.equal, *results))


def test_inf_measures_and_multiplies_by_nothing() -> None:
    row = Row("adamw", distopt.AdamW, {"lr": 0.1, "weight_decay": 0.1}, lambda *_: [])
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = row.make(params)
    pull(params, 0).backward()
    clip = distopt.Clip(opt)
    assert clip.factor == 1.0
    assert clip.norm.item() == pytest.approx(math.sqrt(sum(p.grad.double().square().sum() for p in params)))
    assert [norm.item() for norm in clip.by_param().values()] == [pytest.approx(p.grad.norm().item()) for p in params]


def test_sam_passes_it_to_any_optimizer() -> None:
    """To one of torch's as gradients that were multiplied before."""
    for make in (lambda params: distopt.LAMB(params, lr=0.1), lambda params: torch.optim.AdamW(params, lr=0.1)):
        results = []
        for how in ("before", "in the step"):
            params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
            sam = distopt.SAM(make(params))
            for _ in range(2):
                pull(params, 0).backward()
                sam.perturb()
                sam.zero_grad()
                pull(params, 0).backward()
                sam.restore()
                step(sam, how)
                sam.zero_grad()
            results.append(params)
        assert all(map(torch.equal, *results))


def test_a_clip_of_others_and_a_closure_are_refused() -> None:
    first, other = (distopt.SGD([torch.ones(3, requires_grad=True)]) for _ in range(2))
    for opt in (first, other):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"of another optimizer, or of a layout .*: make it of the"):
        first.step(clip=distopt.Clip(other, 1.0))
    steppers: list[Any] = [first, distopt.SAM(first)]
    for stepper in steppers:
        with pytest.raises(ValueError, match=r"a closure, which computes new gradients, and a clip"):
            stepper.step(lambda: 1.0, clip=distopt.Clip(first, 1.0))
    assert all(torch.equal(p, torch.ones(3)) for opt in (first, other) for p in opt.param_groups[0]["params"])


def sharded_steps(kind: str, optimizer: str, how: str) -> tuple[list[Tensor], list[int]]:
    """The weights after three steps, at one of which two parameters have no gradient; the collectives of each."""
    model, counts = sharded(kind), []
    cls, options = {
        "lars": (distopt.LARS, {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.1}),
        "lars alone": (distopt.LARS, {"lr": 1.0, "momentum": 0.5}),
        "lamb": (distopt.LAMB, {"lr": 0.1}),
    }[optimizer]
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "trust_ratio": optimizer == "lars alone"}]
    opt = cls(groups, **options)
    bind(kind, opt, model)
    distopt.prove_every(opt, steps=0)
    for i in range(3):
        opt.zero_grad()
        backward(model, kind, i)
        with Collectives() as seen:
            step(opt, how, 0.5)
        counts.append(sum("allreduce" in name for name in seen.seen))
    return full(model), counts


@pytest.mark.parametrize(("kind", "world"), [("replicated", 1), ("fsdp2", 2), ("fsdp2", 4), ("zero1", 2), ("hsdp", 4)])
@pytest.mark.parametrize("optimizer", ["lars", "lars alone", "lamb"])
def test_lars_clips_and_steps_by_one_all_reduce(kind: str, world: int, optimizer: str) -> None:
    (before, _), *_ = run(world, sharded_steps, kind, optimizer, "before")
    for weights, counts in run(world, sharded_steps, kind, optimizer, "consuming"):
        assert distance(weights, before) < 1e-13
        sharding = kind != "replicated"
        assert counts == [sharding * (2 if optimizer == "lamb" and kind != "zero1" else 1)] * 3
