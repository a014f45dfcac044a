"""SAM is one optimizer to everybody else: schedules, state dicts, param groups."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import distopt
from distopt import SAM
from tests.harness.optimizers import named
from tests.harness.sam_closures import RHO, by_closure, leaves

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
