"""What torch's own tests check of schedules, averaged models and loss scales, of ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import distopt
from distopt import LAMB, LARS, SGD, Adagrad, AdamW, RMSprop
from distopt.kernels.rules import Rule
from tests.harness.torch_suite import assert_close, forward_backward, layer, walk

# Schedules.

S = lr_scheduler
SCHEDULES: dict[str, Callable[[Any], list[Any]]] = {
    "step": lambda o: [S.StepLR(o, gamma=0.9, step_size=2)],
    "linear, plateau": lambda o: [S.LinearLR(o, 0.4, 0.8, total_iters=4), S.ReduceLROnPlateau(o, patience=1)],
    "constant, exponential": lambda o: [S.ConstantLR(o, 0.4, total_iters=4), S.ExponentialLR(o, gamma=0.9)],
    "polynomial": lambda o: [S.PolynomialLR(o, power=0.9, total_iters=4)],
    "chained": lambda o: [S.ChainedScheduler([S.ConstantLR(o, 0.4, total_iters=4), S.ExponentialLR(o, gamma=0.9)])],
    "sequential": lambda o: [S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingLR(o, 5)], milestones=[3])],
    "restarts": lambda o: [S.CosineAnnealingWarmRestarts(o, T_0=3)],
    "one cycle": lambda o: [S.OneCycleLR(o, max_lr=0.1, total_steps=10, base_momentum=0.0)],
    "cyclic": lambda o: [S.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=3)],
    "averaged": lambda o: [swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3)],
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedules_change_lr_as_in_torch(name: str, tensor: bool) -> None:
    """The learning rate, a number or a tensor, and what some cycle with it: momentum, from 0 on too, and betas."""
    cycles = name in ("one cycle", "cyclic")
    rows: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (SGD, {"momentum": 0.0 if name == "one cycle" else 0.9, "dampening": 0.5}, {}),
        (RMSprop, {"momentum": 0.5}, {}),
        (AdamW, {}, {}),
        (LAMB, {}, {"trust_ratio": False, "eps": 1e-8}),
        (LARS, {"momentum": 0.9}, {"trust_ratio": False}),
        *([] if cycles else [(Adagrad, {}, {})]),
    ]
    peers = {LAMB: torch.optim.AdamW, LARS: torch.optim.SGD}
    for cls, kwargs, own in rows:
        lrs = []
        results = []
        for make, more in ((cls, own), (peers.get(cls) or getattr(torch.optim, cls.__name__), {})):
            params = layer()
            kwargs["lr"] = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
            opt = make(params, **kwargs, **more)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR's own, and those of schedules made before a step
                schedules = SCHEDULES[name](opt)
                for _ in range(9):
                    loss = forward_backward(opt, params)
                    opt.step()
                    for schedule in schedules:
                        schedule.step(*([loss.item()] if isinstance(schedule, S.ReduceLROnPlateau) else []))
            results.append(params)
            lrs.append(float(opt.param_groups[0]["lr"]))
        assert lrs[0] == lrs[1]
        assert_close(*results)


# Around the optimizer.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_cleared_as_asked(set_to_none: bool) -> None:
    params = layer()
    opt = AdamW(params, foreach=True)
    forward_backward(opt, params)
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_named_parameters_and_averaged_models() -> None:
    model = nn.Linear(3, 2)
    opt = AdamW(model.named_parameters(), lr=0.1)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    averaged = swa_utils.AveragedModel(model)
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        opt.step()
        averaged.update_parameters(model)
    assert not torch.equal(averaged.module.weight, model.weight)


@pytest.mark.parametrize("inf", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_off_and_an_overflow_left_out(inf: bool, fused: bool) -> None:
    """A `fused` optimizer of torch's does both itself, and tells GradScaler so; ours leaves it to GradScaler."""
    results = []
    for make in (AdamW, torch.optim.AdamW):
        params = layer()
        opt = make(params, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            opt.zero_grad()
            scaler.scale(sum(p.square().sum() for p in params)).backward()
            if inf and step == 1:
                params[0].grad[0, 0] = torch.inf
            if step == 2:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append((params, scaler.get_scale()))
    (ours, scale), (theirs, other) = results
    assert scale == other
    assert_close(ours, theirs)


def test_a_profiler_sees_the_step() -> None:
    params = layer()
    opt = AdamW(params)
    forward_backward(opt, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_a_rule_may_have_an_option_that_torch_has_too() -> None:
    class Own(distopt.ShardedOptimizer):
        torch_options = {k: v for k, v in distopt.ShardedOptimizer.torch_options.items() if k != "amsgrad"}  # noqa: RUF012

        def __init__(self, params: Any, lr: float = 0.5, amsgrad: bool = True) -> None:
            super().__init__(params, {"lr": lr, "amsgrad": amsgrad})

        def rule(self, group: dict[str, Any]) -> Rule:
            return Rule()

        def directions(self, shards: Any) -> list[Tensor]:
            assert shards.group["amsgrad"] is True
            return [g.clone() for g in shards.grads]

    params = layer()
    opt = Own(params)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    walk(opt, params, 1)
