"""Replicas that have drifted apart take the weights and the state of the majority, or the run stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.layout import local
from tests.harness.distributed import run
from tests.harness.proof_setups import back, cut, net
from tests.harness.sharded import mesh


def _made(engine: str) -> tuple[Any, Any]:
    if engine == "hsdp":
        model: Any = cut(net(), mesh((3, 1), ("replicate", "shard")))
        return distopt.LAMB(model.parameters(), lr=0.1), model
    model = DDP(net())
    if engine == "torch":
        return torch.optim.AdamW(model.parameters(), lr=0.1), model
    optimizer = distopt.LAMB(model.parameters(), lr=0.1)
    if engine == "zero1":
        optimizer.bind(distopt.layout.zero1_layout(model, gradients="reduce_scatter"))
    return optimizer, model


def _spoil(value: Tensor) -> None:
    with torch.no_grad():
        local(value).view(-1)[3] += 1.0


def _drifts(engine: str, wrong: dict[int, list[int]], state: int | None, gradient: bool = False) -> Any:
    """Six steps, before the fourth of which parameters of some ranks change: what was said, and all values."""
    optimizer, model = _made(engine)
    said: list[str] = []
    distopt.prove_every(optimizer, model, steps=1, state=True, heal=said.append)
    params = list(model.parameters())
    for step in range(6):
        back(model, step)
        if step == 3:
            for index in wrong.get(dist.get_rank(), ()):
                _spoil(params[index].grad if gradient else params[index])
            if state == dist.get_rank():
                _spoil(optimizer.state[params[0]]["exp_avg"])
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
        optimizer.zero_grad()
    values = [local(p).detach().clone() for p in params]
    values += [local(b).clone() for p in params for _, b in sorted(optimizer.state[p].items())]
    return said, values


@pytest.mark.parametrize("engine", ["ddp", "zero1", "hsdp", "torch"])
def test_the_majority_heals_and_the_run_goes_on_as_if_nothing_had_been(engine: str) -> None:
    right = run(3, _drifts, engine, {}, None)
    state = None if engine == "zero1" else 2  # each part of it is on one rank
    healed = run(3, _drifts, engine, {1: [0, 2], 2: [3]}, state)
    for (said, values), (nothing, expected) in zip(healed, right):
        assert nothing == [] and len(said) == 1
        assert said == healed[0][0] and said[0].startswith("replicas had drifted apart and were healed: ")
        assert "2.weight on rank 1 from rank 0" in said[0] and "2.bias on rank 2 from rank 0" in said[0]
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize(
    ("wrong", "gradient", "message"),
    [
        ({0: [0], 1: [1], 2: [0, 0]}, False, "no majority among ranks 0, 1, 2"),
        ({1: [0]}, True, "ranks differ in the gradient: rank 1 against all others"),
    ],
)
def test_without_a_majority_it_stops(wrong: dict[int, list[int]], gradient: bool, message: str) -> None:
    said = run(3, _drifts, "ddp", wrong, None, gradient)
    assert said[0] == said[1] == said[2] and message in said[0]


def test_two_replicas_have_no_majority() -> None:
    assert "ranks differ in the weights" in run(2, _drifts, "ddp", {1: [0]}, None)[0]
