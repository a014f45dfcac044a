"""Under torch.compile: a step is an island of eager code, and what is around it is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.optimizers import ROWS, Row, named

pytestmark = pytest.mark.filterwarnings("ignore:.*record function.*ignored")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(step: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    return model, copy.deepcopy(model)


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and how many graphs were made of it."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    return torch.compile(function, backend=backend), graphs


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def train(model: nn.Module, opt: torch.optim.Optimizer, schedule: Any, x: Tensor) -> None:
    model(x).square().mean().backward()
    distopt.clip_grad_norm_(opt, 0.5)
    opt.step()
    schedule.step()
    opt.zero_grad()


@pytest.mark.parametrize("row", [named("adamw"), named("lars")], ids=lambda row: row.name)
def test_a_train_step_may_be_compiled(row: Row) -> None:
    """It was a TypeError, 'Parameter' object is not callable: dynamo called the optimizer's weak references."""
    model, other = models()
    fast, graphs = compiled(train)
    for m, do in ((model, fast), (other, train)):
        opt = row.make(row.groups([*m.parameters()]))
        schedule = distopt.warmup_cosine(opt, warmup_steps=2, total_steps=10)
        for step in range(4):
            do(m, opt, schedule, batch(step))
    assert_equal(model, other)
    assert graphs  # the forward pass


def test_the_step_of_every_optimizer_may_be_compiled() -> None:
    for row in ROWS:
        model, other = models()
        for m, fast in ((model, True), (other, False)):
            opt = row.make(row.groups([*m.parameters()]))
            step = compiled(opt.step)[0] if fast else opt.step
            for i in range(2):
                opt.zero_grad()
                m(batch(i)).square().mean().backward()
                step()
        assert_equal(model, other)


def ascend(model: nn.Module, sam: distopt.SAM, x: Tensor) -> None:
    model(x).square().mean().backward()
    sam.perturb()
    sam.zero_grad()
    model(x).square().mean().backward()
    sam.restore()
    sam.step()
    sam.zero_grad()


def test_both_passes_of_sam_may_be_compiled() -> None:
    model, other = models()
    for m, do in ((model, compiled(ascend)[0]), (other, ascend)):
        sam = distopt.SAM(named("adamw").make([*m.parameters()]), rho=0.1)
        for step in range(3):
            do(m, sam, batch(step))
    assert_equal(model, other)


@pytest.mark.parametrize("sam", [False, True], ids=["optimizer", "SAM"])
def test_a_compiled_model_in_a_closure_stays_compiled(sam: bool) -> None:
    """The island holds the step, not the model that its closure runs."""
    model, _ = models()
    fast, graphs = compiled(model)
    opt: torch.optim.Optimizer = named("adamw").make([*model.parameters()])
    opt = distopt.SAM(opt) if sam else opt

    def closure() -> Tensor:
        opt.zero_grad()
        loss = fast(batch(0)).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert graphs == [3]
