"""Gradient health: the norms of every layer and step, without a collective of their own, alarms, and actions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from benchmarks.collectives import Collectives
from distopt.health import Alarm, Monitor, StepNorms
from tests.harness.cells import covering, some
from tests.harness.distributed import RankError, run
from tests.harness.healths import BY_NAME, UNWATCHED, Line, graded, setup
from tests.harness.optimizers import named
from tests.harness.sharded import full

STEPS = 4


def recorded(kind: str, name: str) -> list[StepNorms]:
    model, inner, opt = setup(kind, BY_NAME[name], torch.float64)
    found: list[StepNorms] = []
    monitor = Monitor(opt, inner, on_step=found.append)
    for step in range(STEPS):
        graded(model, inner, kind, step)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    monitor.flush()
    return found


def by_hand(name: str) -> list[dict[str, list[float]]]:
    """The norms of the unsharded run in float64, from the weights before and after each step."""
    model, inner, opt = setup("replicated", BY_NAME[name], torch.float64)
    rows = []
    for step in range(STEPS):
        graded(model, inner, "replicated", step)
        params = [p for p in inner.parameters() if p.requires_grad]
        gradient = [0.0 if p.grad is None else float(p.grad.norm()) for p in params]
        distopt.clip_grad_norm_(opt, 1.0)
        before = [p.detach().clone() for p in params]
        opt.step()
        update = [float((p.detach() - b).norm()) if p.grad is not None else math.nan for p, b in zip(params, before)]
        weight = [float(b.norm()) if p.grad is not None else math.nan for p, b in zip(params, before)]
        ratios = opt.trust_ratios()
        trust = [math.nan if p.grad is None else float(ratios.get(p, 1.0)) for p in params]
        # `trained` orders the layers by param group
        order = [next(i for i, p in enumerate(params) if p is q) for q in opt.layout.params]
        columns = {"gradient": gradient, "weight": weight, "update": update, "trust": trust}
        rows.append({key: [column[i] for i in order] for key, column in columns.items()})
    return rows


def same(found: list[StepNorms], expected: list[dict[str, list[float]]], order: list[int] | None = None) -> None:
    assert [norms.step for norms in found] == list(range(1, STEPS + 1))
    for norms, row in zip(found, expected):
        for key, values in row.items():
            # Weights of about 1 move by 1e-3: their difference has 12 digits of float64.
            assert getattr(norms, key).tolist() == pytest.approx(values, rel=1e-10, abs=1e-14, nan_ok=True), key


@pytest.mark.parametrize("name", BY_NAME)
def test_norms_are_those_of_the_weights_before_and_after_a_step(name: str) -> None:
    """Also of a layer without gradient (nan), of zeros, and with the trust ratio within the momentum (LARS)."""
    same(recorded("replicated", name), by_hand(name))


@pytest.mark.parametrize(("name", "kind"), covering(["adamw", "lamb", "lars", "sgd"], ["fsdp2", "zero1"]))
@pytest.mark.parametrize("world", some([2], [1, 2]))
def test_sharded_norms_are_the_unsharded_ones(world: int, kind: str, name: str) -> None:
    expected = by_hand(name)
    if kind == "zero1":  # its layout has the order of the model, and the others that of the param groups
        order = run(1, layer_names, "zero1", name)[0]
        plain = layer_names("replicated", name)
        expected = [{key: [v[plain.index(n)] for n in order] for key, v in row.items()} for row in expected]
    for found in run(world, recorded, kind, name):
        same(found, expected)


def layer_names(kind: str, name: str) -> list[str]:
    _, inner, opt = setup(kind, BY_NAME[name], torch.float64)
    return Monitor(opt, inner).names


def collectives(kind: str, name: str, watched: bool) -> list[str]:
    model, inner, opt = setup(kind, BY_NAME[name], torch.float32)
    if watched:
        Monitor(opt, inner)
    for step in range(2):
        graded(model, inner, kind, step)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    with Collectives() as mode:
        graded(model, inner, kind, 2)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    return mode.seen


@pytest.mark.parametrize(("name", "kind"), covering(["adamw", "lamb", "lars"], ["fsdp2", "zero1"]))
def test_a_watched_step_has_no_collective_more(kind: str, name: str) -> None:
    (without, *_), (watched, *_) = run(2, collectives, kind, name, False), run(2, collectives, kind, name, True)
    assert watched == without
    assert sum("allreduce" in seen for seen in watched) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "nesterov", "rmsprop_centered_momentum", "adagrad"])
def test_watching_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Kernels, the unfused fallback and masters: the direction is measured on its way, and applied as otherwise."""
    models = []
    for watched in (False, True):
        model, inner, opt = setup("replicated", BY_NAME[name], dtype)
        if watched:
            Monitor(opt, inner)
        for step in range(6):
            graded(model, inner, "replicated", step)
            distopt.clip_grad_norm_(opt, 1.0)
            opt.step()
        models.append(full(inner))
    assert all(torch.equal(a, b) for a, b in zip(*models))


DEPTH = 50
INITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "too small": (lambda w: nn.init.xavier_normal_(w, gain=0.5), "vanishing"),
    "too large": (lambda w: nn.init.xavier_normal_(w, gain=3.0), "exploding"),
    "Xavier": (nn.init.xavier_normal_, ""),
    "He": (nn.init.kaiming_normal_, ""),
}


def tanh_network(init: Callable[[Tensor], Any], width: int = 32, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        linear = nn.Linear(width, width, bias=bias)
        init(linear.weight)
        if bias:
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def trained(model: nn.Module, monitor: Monitor, opt: Any, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()


def test_the_monitor_tells_initialisations_of_a_deep_network_apart() -> None:
    """The factors of the biases: 1/2 for half of Xavier's weights, 1 for Xavier, more for He, and far more above."""
    factors = {}
    for name, (init, kind) in INITS.items():
        torch.manual_seed(0)
        model = tanh_network(init)
        opt = distopt.AdamW(model.parameters(), lr=1e-4)
        alarms: list[Alarm] = []
        monitor = Monitor(opt, model, on_alarm=alarms.append)
        trained(model, monitor, opt, 3)
        assert {alarm.kind for alarm in alarms} == ({kind} if kind else set()), name
        assert all(alarm.step in (1, 2) and alarm.layer in ("*.weight", "*.bias") for alarm in alarms)
        factors[name] = {trend.series.name: trend.factor for trend in monitor.trends()}["*.bias"]
    assert factors["too small"] == pytest.approx(0.5, abs=0.05)
    assert factors["Xavier"] == pytest.approx(0.97, abs=0.04)
    assert 1.02 < factors["He"] < 1.15
    assert factors["too large"] > 1.2


def test_weights_alone_do_not_show_that_forward_and_backward_vanish_alike() -> None:
    """The gradient of a weight is the product of both, the same at every depth; the biases' is what comes back."""
    torch.manual_seed(0)
    model = tanh_network(INITS["too small"][0], bias=False)
    opt = distopt.SGD(model.parameters(), lr=1e-4)
    monitor = Monitor(opt, model, on_alarm=lambda alarm: None)
    trained(model, monitor, opt, 1)
    (found,) = monitor.trends()
    assert found.factor == pytest.approx(1.0, abs=0.05)


def all_reduced() -> None:
    model = DistributedDataParallel(Line())
    opt = distopt.AdamW(model.parameters())
    opt.bind(distopt.layout.zero1_layout(model))
    Monitor(opt, model)


def test_what_has_no_norms_is_refused() -> None:
    model = Line()
    for name in UNWATCHED:
        with pytest.raises(ValueError, match=r"cautious=True: a masked|ScheduleFree: the weights y also move"):
            Monitor(named(name).make(model.parameters()), model)
    with pytest.raises(ValueError, match="those of distopt's optimizers, got AdamW: use the one of this name"):
        Monitor(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(RankError, match=r"bind distopt.layout.zero1_layout\(model, gradients='reduce_scatter'\)"):
        run(2, all_reduced)


def test_sam_and_accelerates_wrapper_are_watched() -> None:
    from accelerate import Accelerator

    model = Line()
    sam = distopt.LookSAM(distopt.AdamW(model.parameters(), lr=1e-3), interval=2, model=model)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, sam)
    found: list[StepNorms] = []
    monitor = Monitor(wrapped, prepared, action="rollback", copy_every=2, on_step=found.append)
    x = torch.randn(16, 6)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = prepared(x).square().mean()
        loss.backward()
        return loss

    for step in range(6):
        closure()
        with sam.perturbed():
            if sam.ascends:
                closure()
        if step == 4:
            model.first.bias.grad.fill_(math.nan)
        distopt.clip_grad_norm_(wrapped, 1.0)
        wrapped.step()
    assert monitor.rolled_back == 2  # an alarm at the step that would have copied
    assert [norms.step for norms in found] == [1, 2, 3, 4]
    assert monitor.alarms[0].kind == "non-finite" and monitor.alarms[0].layer == "first.bias"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
