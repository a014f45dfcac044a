"""The range test of the learning rate leaves no trace: everything is the same bits afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.distributed import run
from tests.harness.sharded import backward, bind, full, sharded


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)).bfloat16().float()


def trainer(model: nn.Module, optimizer: Any) -> Any:
    def step(i: int) -> float:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x[:, 0]).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_resumes_as_if_it_had_not_been(before: int, dtype: torch.dtype) -> None:
    """Before the first step there is no state, and afterwards there is none; 16-bit weights have masters in it."""
    runs = []
    for tested in (False, True):
        model = small()
        model[3].to(dtype)
        cast = model.forward
        model.forward = lambda x, m=model: m[3](m[2](m[1](m[0](x))).to(dtype)).float()  # type: ignore[method-assign]
        assert cast is not None
        optimizer = distopt.AdamW(distopt.param_groups(model), lr=1e-2)
        optimizer.param_groups[1]["lr"] = 5e-3
        step = trainer(model, optimizer)
        losses = [step(i) for i in range(before)]
        if tested:
            found = distopt.lr_range_test(model, optimizer, step, steps=12, high=0.1)
            assert len(found.rates) == 12 and found.rates[-1] == pytest.approx(0.1)
            assert [p for p in model.parameters() if p.grad is not None] == []
            assert bool(optimizer.state) == (before > 0)
        losses += [step(i) for i in range(before, 6)]
        state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        runs.append([torch.tensor(losses), *model.state_dict().values(), *state, torch.get_rng_state()])
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_error_leaves_no_trace_either() -> None:
    model = small()
    optimizer = distopt.LAMB(model.parameters(), lr=1e-2)
    step, start = trainer(model, optimizer), [t.clone() for t in model.state_dict().values()]

    def broken(i: int) -> float:
        if i == 2:
            raise RuntimeError("no batch")
        return step(i)

    with pytest.raises(RuntimeError, match="no batch"):
        distopt.lr_range_test(model, optimizer, broken)
    assert all(torch.equal(a, b) for a, b in zip(start, model.state_dict().values()))
    assert optimizer.param_groups[0]["lr"] == 1e-2 and not optimizer.state


def test_it_finds_the_rate_at_which_gradient_descent_diverges() -> None:
    """On 1/2 |x|^2 with noise in the gradient it converges below a rate of 2, above which the test ends soon."""
    x = nn.Parameter(torch.ones(4, dtype=torch.float64))
    model = nn.ParameterList([x])
    optimizer = distopt.SGD([x], lr=1.0)

    def step(i: int) -> float:
        loss = 0.5 * x.square().sum()
        x.grad = x.detach() + 0.1 * torch.randn(4, generator=torch.Generator().manual_seed(i))
        optimizer.step()
        return loss.item()

    found = distopt.lr_range_test(model, optimizer, step, low=1e-3, high=1e3)
    assert 0.05 < found.lowest < 2.0 < 2.0 * found.rates[-1] < 40.0
    assert found.steepest < found.lowest
    assert found.suggested == found.lowest / 10.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 0.0}, "low must be a number > 0, got 0.0"),
        ({"low": 1.0, "high": 1.0}, "high must be a number > 1, got 1.0"),
        ({"steps": 2}, "steps must be an integer >= 3, got 2"),
        ({"steps": True}, "steps must be an integer >= 3, got True"),
    ],
)
def test_bad_input_is_refused(given: dict[str, Any], message: str) -> None:
    model = small()
    optimizer = distopt.SGD(model.parameters())
    with pytest.raises(ValueError, match=message):
        distopt.lr_range_test(model, optimizer, lambda i: 0.0, **given)


def test_others_optimizers_and_losses_that_are_never_finite_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"needs an optimizer of distopt, got Adam"):
        distopt.lr_range_test(model, torch.optim.Adam(model.parameters()), lambda i: 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low=1e-06: the first loss is nan"):
        distopt.lr_range_test(model, distopt.Adam(model.parameters()), lambda i: math.nan)


def on_shards(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The full parameters after 4 steps, without the test and with one in their middle that another rank sees else."""
    results = []
    for tested in (False, True):
        model = sharded(kind)
        optimizer = distopt.LAMB(model.parameters(), lr=0.05)
        bind(kind, optimizer, model)

        def step(i: int, model: nn.Module = model, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            loss = backward(model, kind, i)
            optimizer.step()
            return loss.item() + torch.distributed.get_rank()

        for i in range(4):
            if tested and i == 2:
                distopt.lr_range_test(model, optimizer, step, steps=6, high=1.0)
            step(i)
        results.append(full(model))
    return results[0], results[1]


@pytest.mark.parametrize("kind", ["zero1", "fsdp2"])
def test_it_leaves_no_trace_on_shards(kind: str) -> None:
    for plain, tested in run(2, on_shards, kind):
        assert all(torch.equal(a, b) for a, b in zip(plain, tested, strict=True))
