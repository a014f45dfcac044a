"""The driver of SAM's two passes, which every loop shares."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import distopt
from distopt.rng import random_state
from distopt.sam.two_passes import Pass, two_passes


def trace(make: Any, **options: Any) -> tuple[list[tuple[bool, bool, bool, float]], nn.Linear]:
    """Runs a step; returns, for each pass: second, exchange, whether the weights are perturbed, a random number."""
    model = nn.Linear(3, 2)
    sam = make(distopt.AdamW(model.parameters(), lr=0.1))
    for _ in range(2):
        before = model.weight.detach().clone()
        seen: list[tuple[bool, bool, bool, float]] = []

        def run_pass(this: Pass, before: Any = before, seen: Any = seen) -> int:
            moved = not torch.equal(model.weight, before)
            seen.append((this.second, this.exchange, moved, random.random()))
            sam.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            return len(seen)

        assert two_passes(sam, run_pass, random_state(), **options) == 1
        assert torch.equal(model.weight, before)
        sam.step()
    return seen, model


def test_the_second_pass_is_perturbed_and_draws_the_same_random_numbers() -> None:
    (first, second), _ = trace(distopt.SAM)
    assert (first[:3], second[:3]) == ((False, True, False), (True, True, True))
    assert first[3] == second[3]


def test_a_step_that_does_not_ascend_has_one_pass() -> None:
    seen, _ = trace(lambda inner: distopt.SAM(inner, interval=2))
    assert [each[:3] for each in seen] == [(False, True, False)]


def test_only_the_first_pass_of_local_scope_omits_the_exchange() -> None:
    seen, _ = trace(lambda inner: distopt.SAM(inner, scope="local"))
    assert [each[1] for each in seen] == [False, True]
    seen, _ = trace(lambda inner: distopt.SAM(inner, scope="local", interval=2))
    assert [each[1] for each in seen] == [True]


def test_momentum_sam_runs_its_only_pass_at_the_perturbed_weights() -> None:
    seen, _ = trace(distopt.MomentumSAM)
    assert [each[:3] for each in seen] == [(False, True, True)]


@pytest.mark.filterwarnings("ignore:.*without perturb")
def test_an_incomplete_gradient_does_not_perturb() -> None:
    seen, _ = trace(distopt.SAM, complete=lambda: False)
    assert [each[:3] for each in seen] == [(False, True, False)]


@pytest.mark.parametrize("make", [distopt.SAM, distopt.MomentumSAM, distopt.FunctionalSAM])
def test_a_pass_that_raises_leaves_the_weights_unperturbed(make: Any) -> None:
    model = nn.Linear(3, 2)
    sam = make(distopt.AdamW(model.parameters(), lr=0.1))

    def run_pass(this: Pass) -> None:
        sam.zero_grad()
        sam.loss(model(torch.ones(4, 3)), lambda found: found.square().sum()).backward()
        if failing and (this.second or not sam.needs_ascent_gradient):
            raise KeyError

    failing = False
    two_passes(sam, run_pass, random_state())
    sam.step()
    before, failing = model.weight.detach().clone(), True
    with pytest.raises(KeyError):
        two_passes(sam, run_pass, random_state())
    assert torch.equal(model.weight, before)
    failing = False
    two_passes(sam, run_pass, random_state())
    sam.step()
