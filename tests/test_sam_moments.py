"""What SAM finds in the state of other people's optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import distopt
from tests.harness.optimizers import distance
from tests.harness.sam_problems import squared


class Scaled(torch.optim.Adam):
    """Not torch's: what state it makes shows after a step."""


class Bare(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.99), "momentum": 0.9})

    def step(self, closure: Any = None) -> None:
        pass


SECOND_MOMENTS = {"Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta"}
MOMENTA = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Muon"}
TORCHS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "ASGD",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


@pytest.mark.parametrize("name", TORCHS)
def test_moments_are_asked_of_the_state(name: str) -> None:
    """ASGD's `alpha` and Adamax's `betas` were taken for second moments: it never preconditioned, without a word."""
    make = getattr(torch.optim, name)
    for kind, has, message in (
        (distopt.PreconditionedSAM, SECOND_MOMENTS, f"{name} has no second moments"),
        (distopt.MomentumSAM, MOMENTA, f"{name} has no momentum"),
    ):
        p, q = (torch.arange(1.0, 10.0).view(3, 3).double().requires_grad_() for _ in range(2))
        defaults = dict(make([q], lr=0.01).defaults)
        if name not in has:
            with pytest.raises(ValueError, match=message):
                kind(make([p], lr=0.01))
            continue
        sam, plain = kind(make([p], lr=0.01), rho=1.0), make([q], lr=0.01)
        assert sam.defaults == defaults and not sam.param_groups[0].keys() - plain.param_groups[0].keys()
        for optimizer, param in ((sam.optimizer, p), (plain, q)):  # the question has left no trace
            for _ in range(3):
                param.grad = param.detach().clone()
                optimizer.step()
        assert torch.equal(p, q)
        before, state = p.detach().clone(), sam.state[p]
        sam.perturb()
        moment = next(state[n] for n in ("exp_avg_sq", "square_avg", "sum", "exp_avg", "momentum_buffer") if n in state)
        if kind is distopt.MomentumSAM:
            along = -state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
        else:
            along = p.grad / (moment.sqrt() + 1e-8)
        assert distance([p.detach() - before], [along / along.norm()]) < 1e-12


@pytest.mark.parametrize(
    ("kind", "message"),
    [(distopt.PreconditionedSAM, "Bare has no second moments"), (distopt.MomentumSAM, "Bare has no momentum")],
)
def test_an_optimizer_of_somebody_elses_is_asked_after_its_first_step(kind: Any, message: str) -> None:
    """It may have rules of its own for its parameters, so none is made up to ask it by."""
    for make in (Scaled, Bare):
        p = torch.ones(3, requires_grad=True)
        sam = kind(make([p]))
        sam.step(partial(squared, sam, p))
        if make is Scaled:
            sam.step(partial(squared, sam, p))
        else:
            with pytest.raises(ValueError, match=message):
                sam.step(partial(squared, sam, p))


def test_asking_does_not_run_hooks_or_a_schedule() -> None:
    p, calls = torch.ones(3, requires_grad=True), []
    optimizer = torch.optim.SGD([p], lr=torch.tensor(0.1), momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    distopt.MomentumSAM(optimizer)
    assert calls == [] and not optimizer.state and not getattr(optimizer, "_opt_called", False)
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)
