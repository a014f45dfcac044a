"""When SAM perturbs: start, stop and factors of rho are a pure function of the step, in memory and after a resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from distopt.sam.rho_schedule import RhoSchedule
from tests.harness.sams import MEMBERS

STEPS, RHO = 8, 0.4
FACTORS = {3: 0.5, 5: 1.0}
SHOULD = [0.0, 0.0, 0.5, 0.5, 0.75, 1.0, 0.0, 0.0]  # with start=2, stop=6


def gradient(p: Tensor, step: int) -> Tensor:
    """Of a bent bowl: it is another one at another point."""
    return torch.sin(p + step) + p**3


def losses_of(sam: Any, p: Tensor, steps: range) -> list[Tensor]:
    found = []
    for step in steps:

        def closure(step: int = step) -> Tensor:
            sam.zero_grad()
            loss = ((-torch.cos(p + step)) + p**4 / 4).sum()
            loss.backward()
            return loss

        sam.step(closure)
        found.append(p.detach().clone())
    return found


def start() -> Tensor:
    return torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).requires_grad_()


def test_the_factor_is_the_line_between_the_points_inside_of_start_and_stop() -> None:
    schedule = RhoSchedule(start=2, stop=6, points=FACTORS)
    assert [schedule.factor(step) for step in range(STEPS)] == SHOULD
    assert RhoSchedule().constant and [RhoSchedule().factor(step) for step in (0, 7)] == [1.0, 1.0]
    assert RhoSchedule(points={4: 2.0}).factor(0) == RhoSchedule(points={4: 2.0}).factor(9) == 2.0


def test_sam_steps_as_the_formula_with_the_radius_of_each_step() -> None:
    p = start()
    sam = distopt.SAM(distopt.SGD([p], lr=0.1), rho=RHO, start=2, stop=6, rho_schedule=FACTORS)
    found, right = losses_of(sam, p, range(STEPS)), start().detach()
    for step, factor in enumerate(SHOULD):
        g = gradient(right, step)
        right = right - 0.1 * gradient(right + RHO * factor * g / g.norm(), step)
        assert torch.allclose(found[step], right, rtol=0.0, atol=1e-14)


def test_it_resumes_at_any_step_with_the_same_bits() -> None:
    p = start()
    right = losses_of(distopt.SAM(distopt.AdamW([p], lr=0.1), start=2, stop=6, rho_schedule=FACTORS), p, range(STEPS))
    for stop in (1, 3, 5):
        first, second = start(), start()
        before = distopt.SAM(distopt.AdamW([first], lr=0.1), start=2, stop=6, rho_schedule=FACTORS)
        losses_of(before, first, range(stop))
        after = distopt.SAM(distopt.AdamW([second], lr=0.1), start=2, stop=6, rho_schedule=FACTORS)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        second.data.copy_(first.data)
        assert torch.equal(losses_of(after, second, range(stop, STEPS))[-1], right[-1])


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_outside_of_its_steps_every_member_is_the_plain_optimizer(member: Any) -> None:
    """LookSAM, too, which would go on with the direction that it remembers."""
    p, plain = start(), start()
    optimizer = distopt.Adam([p], lr=0.1)
    sam = member.make(optimizer, stop=2)
    losses = []
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            sam.zero_grad()
            outputs = torch.cat([-torch.cos(p + step), p**4 / 4])
            loss = sam.loss(outputs, torch.sum)
            loss.backward()
            return loss

        sam.step(closure)
        losses.append(p.detach().clone())
    other = distopt.Adam([plain], lr=0.1)
    other.load_state_dict(copy.deepcopy(_at(member, 2)[1]))
    plain.data.copy_(losses[1])
    for step in range(2, 5):
        plain.grad = torch.autograd.grad(torch.cat([-torch.cos(plain + step), plain**4 / 4]).sum(), plain)[0]
        other.step()
        assert torch.equal(plain.detach(), losses[step])


def _at(member: Any, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """The weights and the optimizer's state after some steps that perturb."""
    p = start()
    optimizer = distopt.Adam([p], lr=0.1)
    sam = member.make(optimizer, stop=2)
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            sam.zero_grad()
            loss = sam.loss(torch.cat([-torch.cos(p + step), p**4 / 4]), torch.sum)
            loss.backward()
            return loss

        sam.step(closure)
    return p, optimizer.state_dict()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": -1}, "start must be an integer >= 0, got -1"),
        ({"start": 0.5}, "start must be an integer >= 0, got 0.5"),
        ({"start": 4, "stop": 4}, "stop must be > start, got start=4 and stop=4"),
        ({"rho_schedule": {}}, "rho_schedule must be factors >= 0 by step"),
        ({"rho_schedule": {-1: 1.0}}, "rho_schedule must be factors >= 0 by step"),
        ({"rho_schedule": {0: -1.0}}, "rho_schedule must be factors >= 0 by step"),
        ({"rho_schedule": 0.5}, "rho_schedule must be factors >= 0 by step"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        distopt.SAM(distopt.SGD([start()], lr=0.1), **options)
