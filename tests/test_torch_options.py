"""What torch's own tests check of options that are errors or change in mid-run, of ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import distopt
from distopt import LAMB, LARS, SGD, Adagrad, Adam, AdamW, RMSprop
from tests.harness.torch_suite import assert_close, first, layer, reloaded, walk

CLASSES = (SGD, Adagrad, RMSprop, Adam, AdamW)


# What is an error there.

P = nn.Parameter(torch.ones(1, 1))
BAD_PARAMS: list[tuple[Any, type[Exception], str]] = [
    (P, TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
    ([{"params": P}, {"params": P}], ValueError, "some parameters appear in more than one parameter group"),
    ([("weight", P), nn.Parameter(torch.ones(1))], ValueError, "Some param names are missing"),
    ([{"params": [P]}, {"params": [("weight", nn.Parameter(torch.ones(1)))]}], ValueError, "with names to the optim"),
    ([], ValueError, "optimizer got an empty parameter list"),
    ([1.0], TypeError, "optimizer can only optimize Tensors, but one of the params is float"),
    ([{"params": {P}}], TypeError, "optimizer parameters need to be organized in ordered collections"),
    ([P * 2], ValueError, "can't optimize a non-leaf Tensor"),
    (nn.Linear(1, 1), TypeError, "'Linear' object is not iterable"),
    ([torch.ones(2, dtype=torch.complex64)], ValueError, "dtype torch.complex64: distopt's rules are for real numbers"),
]


@pytest.mark.parametrize("cls", [*CLASSES, LAMB, LARS])
def test_bad_parameters(cls: Any) -> None:
    for params, kind, message in BAD_PARAMS:
        with pytest.raises(kind, match=message):
            cls(params)
    with pytest.raises(UserWarning, match="a parameter group with duplicate parameters"):
        cls([P, P])


# (class, arguments, what torch says of them, what ours say: None where they are taken)
BAD: list[tuple[Any, dict[str, Any], str, str | None]] = [
    *[(cls, {"lr": LR2}, "Tensor lr must be 1-element", r"lr must be .* or a floating-point tensor of one, got .*\[2\]")
      for cls in CLASSES for LR2 in [torch.tensor([0.001, 0.001])]],
    (Adagrad, {"lr_decay": -0.5}, "Invalid lr_decay value: -0.5", "lr_decay must be a number >= 0, got -0.5"),
    (RMSprop, {"momentum": -1.0}, "Invalid momentum value: -1.0", r"momentum must be a number in \[0, 1\), got -1.0"),
    (SGD, {"momentum": -0.5}, "Invalid momentum value: -0.5", r"momentum must be a number in \[0, 1\), got -0.5"),
    (Adam, {"betas": (1.0, 0.0)}, "beta parameter at index 0", r"betas must be two numbers.* got .1.0, 0.0"),
    (Adam, {"weight_decay": -1}, "Invalid weight_decay value: -1", "weight_decay must be a number >= 0, got -1"),
    (Adam, {"betas": (0.9, torch.tensor(0.99))}, "either both floats or both Tensors", "betas must be two numbers"),
    (Adam, {"betas": (torch.tensor(0.9), 0.99)}, "either both floats or both Tensors", "betas must be two numbers"),
    (Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True}, "as a Tensor", "betas must be two num"),
    (Adam, {"lr": torch.tensor(0.001), "foreach": True}, "lr as a Tensor is not supported", None),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "kwargs", "theirs", "ours"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_hyper_parameters(cls: Any, kwargs: dict[str, Any], theirs: str, ours: str | None) -> None:
    with pytest.raises(ValueError, match=theirs):
        getattr(torch.optim, cls.__name__)([first()], **kwargs)
    if ours is None:
        cls([first()], **kwargs)
        return
    with pytest.raises(ValueError, match=ours):
        cls([first()], **kwargs)


@pytest.mark.parametrize("cls", [*CLASSES, LAMB, LARS])
def test_sparse_gradients_are_refused_before_anything_changes(cls: Any) -> None:
    """In the second group, the first one's steps had been counted; and clipping and SAM died of a kernel of torch's."""
    weight, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    opt = cls([{"params": [weight]}, {"params": embedding.parameters()}])
    opt.init_state()
    weight.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    for use in (opt.step, distopt.SAM(opt).perturb, lambda: distopt.clip_grad_norm_(opt, 1.0)):
        with pytest.raises(ValueError, match=r"sparse gradients .*: use nn.Embedding\(sparse=False\)"):
            use()
    assert opt.state[weight]["step"].item() == 0.0
    assert torch.equal(weight, torch.ones(3))


# Options that change in mid-run.

CHANGES: list[tuple[type, dict[str, Any], list[dict[str, Any]]]] = [
    (SGD, {"dampening": 0.5}, [{"momentum": 0.9}]),
    (SGD, {"dampening": 0.5, "momentum": 0.9}, [{"momentum": 0.0}, {"momentum": 0.8}]),
    (SGD, {}, [{"momentum": 0.9, "nesterov": True}]),
    (SGD, {"momentum": 0.9}, [{"dampening": 0.5}, {"lr": 0.01, "weight_decay": 0.1}, {"maximize": True}]),
    (Adagrad, {}, [{"lr_decay": 0.1}, {"eps": 1e-3, "lr": 0.1}]),
    (RMSprop, {"momentum": 0.5}, [{"alpha": 0.9}, {"momentum": 0.9}]),
    (Adam, {}, [{"betas": (0.5, 0.9)}, {"eps": 1e-3}]),
    (AdamW, {}, [{"weight_decay": 0.5}, {"betas": (0.5, 0.999), "lr": 0.1}]),
]


@pytest.mark.parametrize(("cls", "kwargs", "changes"), CHANGES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved between"])
def test_options_that_change_in_mid_run(cls: Any, kwargs: dict[str, Any], changes: list[Any], saved: bool) -> None:
    """As torch's, also through a checkpoint between the change and the next step.

    SGD's first momentum is the gradient, undampened: switched on at step 3 it was dampened.
    """
    ours, theirs = layer(), layer()
    opt, peer = cls(ours, **kwargs), getattr(torch.optim, cls.__name__)(theirs, **kwargs)
    for change in [{}, *changes]:
        for o in (opt, peer):
            o.param_groups[0].update(change)
        if saved:
            opt.init_state()
            state = reloaded(opt.state_dict())
            opt = cls(ours, **kwargs)
            opt.load_state_dict(state)
        for params, o in ((ours, opt), (theirs, peer)):
            if change:
                params[1].grad = None  # a parameter whose momentum begins a step later
                params[0].grad = torch.ones_like(params[0])
                o.step()
            walk(o, params, 2)
    assert_close(ours, theirs)


def test_momentum_may_be_switched_on_for_rmsprop_too() -> None:
    """torch's raises a KeyError there. From zero it is the same as if it had been there and stood still."""
    params, always = layer(), layer()
    opt, reference = RMSprop(params), RMSprop(always, momentum=0.9)
    walk(opt, params, 2)
    walk(reference, always, 2)
    for p, q in zip(params, always):
        q.data.copy_(p.data)
        reference.state[q]["momentum_buffer"].zero_()
    opt.param_groups[0]["momentum"] = 0.9
    walk(opt, params, 3)
    walk(reference, always, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, always))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": float("-inf")}, "lr must be a finite number, got -inf"),
        ({"lr": "0.1"}, "lr must be a finite number, got '0.1'"),
        ({"lr": True}, "lr must be a finite number, got True"),
        ({"lr": None}, "lr must be a finite number, got None"),
        ({"lr": 10**400}, "lr must be a finite number, got an integer beyond the largest float"),
        ({"lr": torch.tensor([0.1, 0.1])}, r"lr must be .* a floating-point tensor of one, got torch.float32 of shape"),
        ({"lr": torch.tensor(1)}, r"lr must be .* a floating-point tensor of one, got torch.int64 of shape \[\]"),
        ({"lr": torch.tensor(float("nan"))}, "lr must be a finite number, got nan"),
        ({"lr": torch.tensor(0.1, device="meta")}, "lr is a tensor on meta"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"amsgrad": True}, "amsgrad=True"),
    ],
    ids=str,
)
def test_a_bad_value_in_mid_run_is_refused_before_anything_changes(change: dict[str, Any], message: str) -> None:
    params = layer()
    opt = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    walk(opt, params, 1)
    before = copy.deepcopy((opt.state_dict()["state"], params))
    opt.param_groups[1].update(change)
    with pytest.raises(ValueError, match=f"^{message}"):
        opt.step()
    torch.testing.assert_close((opt.state_dict()["state"], params), before, rtol=0, atol=0)


def test_an_lr_that_rounds_below_zero_is_accepted() -> None:
    """torch's LinearLR is a recurrence, whose last value may be -1e-20."""
    params = layer()
    opt = AdamW(params)
    walk(opt, params, 1)
    opt.param_groups[0]["lr"] = -1e-20
    walk(opt, params, 1)


def test_numbers_of_numpy_become_pythons() -> None:
    """Or a state dict of them could not be loaded with weights_only."""
    numpy = pytest.importorskip("numpy")
    opt = AdamW(layer(), lr=numpy.float32(0.125), betas=(numpy.float64(0.5), 0.75), weight_decay=numpy.int64(1))
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 1.0)
    assert {type(x) for x in (group["lr"], *group["betas"], group["weight_decay"])} == {float}
    for bad in (numpy.bool_(True), numpy.array([0.1, 0.1])):
        with pytest.raises(ValueError, match="lr must be a number >= 0, got"):
            AdamW(layer(), lr=bad)
    group["lr"] = numpy.float32(0.25)  # as a schedule of somebody's sets it
    walk(opt, group["params"], 1)
