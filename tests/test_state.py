"""The state of an optimizer is what its layout says: loaded, moved, copied, or refused before anything changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import distopt
from distopt import layout
from tests.harness.distributed import run
from tests.harness.sharded import mesh
from tests.harness.states import SHAPES, full, make, train, weights

EMPTY = [(0, 4), (4, 0), (0,)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """To the last bit but those of float32 that depend on the order of a sum over ranks."""
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(left, right, strict=True))


# A state dict, or a layout, that comes later.


def loaded(dtype: torch.dtype) -> list[Any]:
    """Whether the run is the unbroken one after a state dict of each kind was loaded into each other."""
    wrong: list[Any] = []
    kinds = ("plain", "zero1", "fsdp2")
    for here, there in [(a, b) for a in kinds for b in kinds]:
        model, opt = make(here, dtype)
        train(model, opt)
        other, loading = make(there, dtype)
        with torch.no_grad():
            for p, q in zip(other.parameters(), weights(model)):
                p.copy_(distribute_tensor(q, p.device_mesh, p.placements) if hasattr(p, "placements") else q)
        loading.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(model, opt)
        train(other, loading)
        laid_out = {hasattr(v, "placements") for s in loading.state.values() for k, v in s.items() if k != "step"}
        if not same(weights(model), weights(other)) or laid_out != {there != "plain"}:
            wrong.append((here, there, laid_out))
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_any_layout_is_laid_out_as_the_optimizer_steps(dtype: torch.dtype) -> None:
    """A full state that was loaded under ZeRO-1 stayed full, each rank moved its rows, and a state dict had stale ones
    for all others."""
    assert run(2, loaded, dtype) == [[], []]


def bound_later() -> dict[str, Any]:
    found: dict[str, Any] = {}
    expected, of_expected = make("plain")
    train(expected, of_expected)
    train(expected, of_expected)

    model, opt = make("plain")
    train(model, opt)
    opt.bind(layout.zero1_layout(model, mesh((2,), ("shard",))))
    train(model, opt)
    found["bound to zero1 after steps"] = same(weights(model), weights(expected))
    opt.bind(layout.infer_layout(list(model.parameters())))
    train(model, opt)
    train(expected, of_expected)
    found["and back"] = same(weights(model), weights(expected))
    found["in full"] = not any(hasattr(v, "placements") for s in opt.state.values() for v in s.values())

    model, opt = make("plain")
    train(model, opt)
    fully_shard(model, mesh=mesh((2,), ("shard",)))
    opt.param_groups[0]["params"] = list(model.parameters())
    try:
        train(model, opt)
    except ValueError as error:
        found["parameters replaced after steps"] = str(error)

    for kind, shapes in (("zero1", [*SHAPES, *EMPTY, ()]), ("dtensor", [*SHAPES, *EMPTY])):
        for cls in (distopt.LAMB, distopt.LARS, distopt.AdamW):
            results = []
            for each in ("plain", kind):
                model, opt = make(each, cls=cls, shapes=shapes)
                sam = distopt.SAM(opt)
                for step in range(3):
                    for i, p in enumerate(model.parameters()):
                        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if each == "dtensor" else grad
                    sam.perturb()
                    sam.restore()
                    distopt.clip_grad_norm_(opt, 1.0)
                    opt.step()
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                opt.step()
                results.append(weights(model))
            found[f"without elements, {kind}, {cls.__name__}"] = same(*results)
    return found


def copied() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, opt = make("zero1", torch.bfloat16)
    train(model, opt)
    other, of_other = copy.deepcopy((model, opt))
    found["of the copied model"] = all(p is q for p, q in zip(of_other.param_groups[0]["params"], other.parameters()))
    before = weights(other)
    train(model, opt)
    found["not the model's"] = all(torch.equal(a, b) for a, b in zip(weights(other), before))
    train(other, of_other)
    found["zero1"] = all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    found["its layout"] = type(of_other.layout).__name__

    model, opt = make("fsdp2")
    train(model, opt)
    alone, unpickled = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for each in (alone, unpickled):
        for p, q in zip(opt.param_groups[0]["params"], each.param_groups[0]["params"]):
            q.grad = p.grad.clone()
        each.step()
    opt.step()
    found["fsdp2"] = [
        all(torch.equal(full(p), full(q)) for p, q in zip(model.parameters(), each.param_groups[0]["params"]))
        for each in (alone, unpickled)
    ]
    return found


def test_a_layout_that_is_bound_later_lays_out_the_state_also_without_elements() -> None:
    for found in run(2, bound_later):
        assert "replaced them" in found.pop("parameters replaced after steps")
        assert all(found.values()), found


def test_a_bound_optimizer_is_copied_with_its_layout() -> None:
    """deepcopy raised for process groups, and for DTensors that have a gradient; the copy forgot its layout."""
    for found in run(2, copied):
        assert found.pop("its layout") == "Zero1Layout"
        assert found.pop("fsdp2") == [True, True]
        assert all(found.values()), found
