"""State of 16-bit weights: masters on every layout, in state dicts and in checkpoints."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.distributed import run
from tests.harness.states import full, make, train, weights

# Weights of 16 bits.


def small_steps(kind: str, steps: int) -> Tensor:
    model, opt = make(kind, torch.bfloat16, distopt.AdamW)
    for group in opt.param_groups:
        group.update(lr=1e-5, weight_decay=0.0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    return torch.cat([p.view(-1) for p in weights(model)])


def of_all_kinds() -> list[Tensor]:
    return [small_steps(kind, 400) for kind in ("plain", "zero1", "dtensor")]


def test_bfloat16_weights_train_alike_on_every_layout() -> None:
    """ZeRO-1 kept float32 masters and the others none: there, steps below half a unit in the last place were lost."""
    before = torch.cat([p.view(-1) for p in weights(make("plain", torch.bfloat16)[0])])
    (plain, zero1, dtensor), _ = run(2, of_all_kinds)
    assert torch.equal(plain, zero1) and torch.equal(plain, dtensor)
    exact = (before.float() - 400 * 1e-5).bfloat16()
    assert torch.allclose(plain.float(), exact.float(), rtol=2**-7) and (plain != before).float().mean() > 0.7


def test_a_weight_changed_from_outside_is_its_masters_new_value() -> None:
    """Weights that were loaded after the state was made were overwritten by the masters of before."""
    model, opt = make("plain", torch.bfloat16, distopt.SGD)
    train(model, opt)
    first = model.all[0]
    kept = opt.state[first]["master"].clone()
    with torch.no_grad():
        first[0] = 3.0
    opt.zero_grad()
    first.grad = torch.zeros_like(first)
    opt.step()
    assert torch.equal(first[0].detach(), torch.full((3,), 3.0, dtype=torch.bfloat16))
    assert torch.equal(
        opt.state[first]["master"][1:], kept[1:]
    )  # what bfloat16 does not hold of the others is not lost


def test_state_dicts_of_16_bit_parameters_go_both_ways() -> None:
    model, opt = make("plain", torch.bfloat16, torch.optim.AdamW)
    train(model, opt)
    other, ours = make("plain", torch.bfloat16, distopt.AdamW)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    ours.init_state()
    for p, q in zip(other.parameters(), model.parameters()):
        assert torch.equal(ours.state[p]["master"], q.detach().float())
        assert torch.equal(ours.state[p]["exp_avg"], opt.state[q]["exp_avg"].float())
    train(other, ours)
    opt.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(model, opt)

    wide, again = make("plain", torch.float32, distopt.AdamW)
    again.load_state_dict(
        copy.deepcopy(ours.state_dict())
    )  # its weights are what it steps: a master would stand beside
    train(wide, again)
    assert not any("master" in again.state[p] for p in wide.parameters())


def test_masters_are_in_a_checkpoint_and_are_made_where_it_has_none(tmp_path: Any) -> None:
    model, opt = make("plain", torch.bfloat16, distopt.AdamW)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "ours", model, opt)
    other, loading = make("plain", torch.bfloat16, distopt.AdamW)
    distopt.load_checkpoint(tmp_path / "ours", other, loading)
    assert all(torch.equal(opt.state[p]["master"], loading.state[q]["master"]) for p, q in zip(model.all, other.all))

    model, opt = make("plain", torch.bfloat16, torch.optim.AdamW)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "torch", model, opt)
    distopt.load_checkpoint(tmp_path / "torch", other, loading)
    loading.init_state()
    assert all(torch.equal(p.detach().float(), loading.state[q]["master"]) for p, q in zip(model.all, other.all))


def of_the_family(dtype: torch.dtype) -> list[bool]:
    """Whether each member trains alike on every layout, with a full state dict loaded on the way."""
    warnings.simplefilter("ignore")  # of rounding: the perturbations are small
    results = []
    names = ("SAM", "PreconditionedSAM", "MomentumSAM", "FriendlySAM", "LookSAM")
    for member in (getattr(distopt.sam, name) for name in names):
        ends = []
        for kind in ("plain", "zero1", "fsdp2"):
            model, opt = make(kind, dtype, distopt.AdamW)
            sam = member(opt, rho=0.5)

            def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                loss = model(1)
                loss.backward()
                return loss

            for step in range(4):
                if step == 2:
                    held = opt.state_dict()
                    whole = {k: {n: full(v) for n, v in values.items()} for k, values in held["state"].items()}
                    sam.load_state_dict(held | {"state": whole})
                sam.step(closure)
            ends.append(weights(model))
        results += [bool(all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(ends[0], e))) for e in ends[1:]]
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sam_perturbs_and_restores_16_bit_weights_with_masters(dtype: torch.dtype) -> None:
    """Directions of float32 state did not fit float16 weights, and overflowed in them."""
    assert run(2, of_the_family, dtype) == [[True] * 10] * 2


def test_a_frozen_parameter_keeps_its_state() -> None:
    """All that had state were frozen after a load: the state was taken for that of replaced parameters."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = distopt.Adagrad([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    again = distopt.Adagrad([param], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    param.requires_grad_(False)
    again.step()
    assert again.state[param]["step"] == 1.0


def test_a_parameter_that_is_thawed_has_a_count() -> None:
    """A rule without buffers had nothing to see the change by."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = distopt.SGD(params, lr=0.1)
    params[1].requires_grad_(False)
    for _ in range(2):
        params[0].grad = torch.ones(3)
        optimizer.step()
    params[1].requires_grad_(True).grad = torch.ones(3)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0, 1.0]
