"""SAM: the paper's two passes around any torch optimizer, on every layout, and weights that come back bit for bit."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distopt
from distopt import SAM
from tests.harness import oracles
from tests.harness.optimizers import Row, distance, every_row, initial, named, pull
from tests.harness.sam_closures import RHO, STEPS, by_closure, closure_of, leaves


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
