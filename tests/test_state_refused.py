"""What a state dict may not bring, and what does not change in mid-run."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.states import contents, make, train, weights

# What a state dict may not bring.


def spoiled() -> list[tuple[Callable[[dict[str, Any]], Any], str]]:
    return [
        (
            lambda d: d["state"][1].update(exp_avg=torch.ones(4)),
            r"exp_avg of parameter 1 of param group 0 .*\(4,\).*\(1,\)",
        ),
        (lambda d: d["state"][0].update(exp_avg_sq=torch.ones(15)), r"exp_avg_sq of parameter 0 .*\(15,\).*\(5, 3\)"),
        (lambda d: d["state"][2].pop("exp_avg"), r"state of parameter 2 of param group 0 lacks exp_avg \(it has"),
        (lambda d: d["state"][2].pop("step"), r"lacks step"),
        (lambda d: d["state"][0].update(exp_avg=[1.0]), r"is a list, not a tensor"),
        (lambda d: d["param_groups"][0]["params"].pop(), r"doesn't match the size of optimizer's group: group 0 has 2"),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), r"different number of parameter groups: 2"),
        (lambda d: d["param_groups"][0].update(lr=math.nan), r"lr must be a finite number"),
        (lambda d: d["param_groups"][0].update(amsgrad=True), r"amsgrad"),
    ]


@pytest.mark.parametrize("at", range(len(spoiled())))
def test_a_load_that_fails_leaves_the_optimizer_as_it_was(at: int) -> None:
    """A state of another shape was taken, and the compiled kernels read and wrote beyond it."""
    spoil, message = spoiled()[at]
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    state_dict = copy.deepcopy(opt.state_dict())
    for values in state_dict["state"].values():
        values["exp_avg"].fill_(7.0)
    state_dict["param_groups"][0]["weight_decay"] = 0.3
    spoil(state_dict)
    before = contents(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state_dict)
    after = contents(opt)
    assert after[0] == before[0] and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after[1:], before[1:])
    )


def test_a_tensor_that_is_put_into_the_state_is_checked_before_a_kernel_reads_it() -> None:
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    opt.state[model.all[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of 3 has shape \(3,\), its parameter \(5, 3\)"):
        opt.step()
    opt.state[model.all[0]]["exp_avg"] = torch.zeros(5, 3, dtype=torch.float64)
    opt.step()
    assert opt.state[model.all[0]]["exp_avg"].dtype == torch.float32


def test_missing_state_begins_with_zeros_and_momentum_may_begin_late() -> None:
    """As torch's: SGD's state has no step, a parameter may have none, and momentum may be switched on in mid-run."""
    model, opt = make("plain", cls=torch.optim.SGD)
    opt.param_groups[0]["momentum"] = 0.9
    train(model, opt)
    state_dict = copy.deepcopy(opt.state_dict())
    del state_dict["state"][1]
    ours = distopt.SGD(model.parameters(), lr=0.01)
    ours.load_state_dict(state_dict)
    assert [len(ours.state.get(p, {})) for p in model.parameters()] == [2, 0, 2]
    train(model, ours)
    opt.load_state_dict(ours.state_dict())

    plain = distopt.SGD(model.parameters(), lr=0.01)
    train(model, plain)
    plain.param_groups[0]["momentum"] = 0.9
    plain.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(model, plain)
    assert all("momentum_buffer" in plain.state[p] for p in model.parameters())


# By name to the end.


def test_named_parameters_are_filled_by_name() -> None:
    """torch fills by position, although both sides have names: of permuted groups each took another's moments."""
    model, _ = make("plain")
    named = list(model.named_parameters())
    opt = distopt.AdamW(named, lr=0.01)
    train(model, opt)
    wrapped = [(f"module.{name}", p) for name, p in reversed(named)]
    other = distopt.AdamW(wrapped, lr=0.5)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["param_names"] == [name for name, _ in wrapped]
    assert other.param_groups[0]["lr"] == 0.01
    assert all(torch.equal(opt.state[p]["exp_avg"], other.state[p]["exp_avg"]) for _, p in named)

    stranger = distopt.AdamW([("head", named[0][1]), *named[1:]], lr=0.5)
    with pytest.raises(ValueError, match=r"all\.0 is in param group 0 of the state dict only: .* delete param_names"):
        stranger.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.parametrize("cls", [distopt.AdamW, torch.optim.AdamW], ids=["distopt", "torch"])
def test_a_checkpoint_fills_reordered_groups_by_name(cls: Any, tmp_path: Any) -> None:
    model, _ = make("plain")
    opt = cls(list(model.parameters()), lr=0.01)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "saved", model, opt)
    other = cls(list(reversed(list(model.parameters()))), lr=0.5)
    distopt.load_checkpoint(tmp_path / "saved", model, other)
    assert all(torch.equal(opt.state[p]["exp_avg"], other.state[p]["exp_avg"]) for p in model.parameters())


def test_a_checkpoint_of_other_state_is_refused_before_weights_change(tmp_path: Any) -> None:
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    del opt.state[model.all[1]]["exp_avg"]
    opt.init_state = lambda: None  # which would make it
    distopt.save_checkpoint(tmp_path / "saved", model, opt)
    other, loading = make("plain", cls=distopt.AdamW)
    before = weights(other)
    with pytest.raises(ValueError, match=r"the state of all\.1 has no exp_avg in the checkpoint"):
        distopt.load_checkpoint(tmp_path / "saved", other, loading)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), before))


# What does not change in mid-run.


@pytest.mark.parametrize("how", ["load", "unpickle", "deepcopy"])
def test_a_state_dict_is_the_same_after_one_was_loaded(how: str) -> None:
    """torch adds `differentiable` to the defaults, which went into the groups: a checkpoint of before lacked it."""
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    before = [set(group) for group in opt.state_dict()["param_groups"]]
    if how == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt = pickle.loads(pickle.dumps(opt)) if how == "unpickle" else copy.deepcopy(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert [set(group) for group in opt.state_dict()["param_groups"]] == before * 2


def test_steps_are_counted_in_float32_whatever_the_default() -> None:
    """In bfloat16 a count stops at 256."""
    weight = torch.ones(4, requires_grad=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        opt = distopt.AdamW([weight])
        weight.grad = torch.ones(4, dtype=torch.float32)
        for _ in range(300):
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert opt.state[weight]["step"].dtype == torch.float32
    assert float(opt.state[weight]["step"]) == 300


def test_the_cache_of_norms_is_bounded() -> None:
    """Each set of layers that had gradients left two tensors for ever: mixtures of experts have many."""
    params = [torch.randn(4, requires_grad=True) for _ in range(20)]
    opt = distopt.LAMB(params)
    draws, counts = random.Random(0), []
    for step in range(200):
        for p in params:
            p.grad = torch.ones(4) if draws.random() < 0.5 else None
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
        if step in (99, 199):
            opt.zero_grad()
            gc.collect()
            counts.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("refused", ["sparse", "capturable", "shape"])
def test_a_step_that_is_refused_changes_nothing(refused: str) -> None:
    """The first group's steps were counted before the second's gradients were looked at."""
    weight, table = torch.ones(3, requires_grad=True), nn.Embedding(4, 2, sparse=refused == "sparse")
    groups = [{"params": [weight]}, {"params": [table.weight], "capturable": refused == "capturable"}]
    opt = distopt.LAMB(groups)
    weight.grad = torch.ones(3)
    opt.init_state()
    table(torch.tensor([1])).sum().backward()
    if refused == "shape":
        opt.state[table.weight]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"{refused}"):
        opt.step()
    assert float(opt.state[weight]["step"]) == 0.0 and torch.equal(weight.detach(), torch.ones(3))
    for use in (lambda: distopt.clip_grad_norm_(opt), distopt.SAM(opt).perturb) if refused == "sparse" else ():
        with pytest.raises(ValueError, match="sparse gradients have no sharded update"):
            use()
