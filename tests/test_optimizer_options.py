"""Options of the optimizers: what is refused, and the bounds themselves."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from distopt import LAMB, LARS, SGD, Adagrad, Adam, AdamW, RMSprop
from tests.harness.optimizers import initial, pull

# Hyper-parameters.

BAD: list[tuple[type[torch.optim.Optimizer], dict[str, Any], str]] = [
    *[
        (cls, {name: value}, rf"{name} must be a number >= 0, got {re.escape(repr(value))}")
        for cls in (SGD, Adagrad, RMSprop, Adam, AdamW, LAMB, LARS)
        for name in ("lr", "weight_decay")
        for value in (-1e-9, math.nan, math.inf, "0.1", None, True)
    ],
    *[
        (cls, {"weight_decay": torch.tensor(0.1)}, "weight_decay must be a number >= 0, got tensor")
        for cls in (SGD, AdamW)
    ],
    (AdamW, {"lr": 10**400}, "lr must be a number >= 0, got an integer beyond the largest float"),
    (AdamW, {"lr": [0.1] * 100}, r"lr must be a number >= 0, got \[0.1, 0.1.{40,60}\.\.\.$"),
    *[(cls, {"eps": -1.0}, "eps must be a number >= 0, got -1.0") for cls in (Adagrad, RMSprop, Adam, AdamW, LAMB)],
    *[
        (cls, {"momentum": value}, rf"momentum must be a number in \[0, 1\), got {value}")
        for cls in (SGD, RMSprop, LARS)
        for value in (-0.1, 1.0, 1)
    ],
    (RMSprop, {"alpha": 1.0}, r"alpha must be a number in \[0, 1\), got 1.0"),
    (SGD, {"momentum": 0.9, "dampening": 1.1}, r"dampening must be a number in \[0, 1\], got 1.1"),
    (SGD, {"momentum": 0.9, "dampening": -0.1}, r"dampening must be a number in \[0, 1\], got -0.1"),
    (SGD, {"nesterov": True}, "nesterov needs momentum > 0 and dampening 0, got momentum=0.0, dampening=0.0"),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum > 0 and dampening 0"),
    (LARS, {"nesterov": True, "momentum": 0.0}, "nesterov needs momentum > 0"),
    (LARS, {"trust_coefficient": -1.0}, "trust_coefficient must be a number >= 0, got -1.0"),
    (Adagrad, {"lr_decay": -1.0}, "lr_decay must be a number >= 0, got -1.0"),
    (Adagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value must be a number >= 0, got -1.0"),
    *[
        (cls, {"betas": value}, rf"betas must be two numbers in \[0, 1\), got {re.escape(repr(value))}")
        for cls in (Adam, AdamW, LAMB)
        for value in ((0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), 0.9, (0.9, math.nan), ("0.9", 0.9))
    ],
    *[
        (
            cls,
            {"trust_clip": value},
            rf"trust_clip must be two numbers 0 <= low <= high or null, got {re.escape(repr(value))}",
        )
        for cls in (SGD, Adagrad, RMSprop, Adam, AdamW, LAMB, LARS)
        for value in ((2.0, 1.0), (-1.0, 1.0), 1.0, (1.0,), (0.0, math.nan))
    ],
    *[
        (cls, {name: value}, f"{name} must be true or false, got {value!r}")
        for cls in (SGD, LARS, AdamW)
        for name in ("maximize", "trust_ratio")
        for value in (1, None, "true")
    ],
    (RMSprop, {"centered": 1}, "centered must be true or false, got 1"),
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_hyper_parameters_are_refused_with_value_and_bound(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    (p,) = initial((2, 2))
    with pytest.raises(ValueError, match=message):
        cls([p], **kwargs)
    opt = cls([p])
    (q,) = initial((2, 2))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [q], **kwargs})
    assert len(opt.param_groups) == 1  # or the next step would use it
    opt.add_param_group({"params": [q]})


GOOD: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD, dict(lr=0, momentum=0.0, dampening=1.0, weight_decay=0)),
    (SGD, dict(lr=10**6, momentum=1.0 - 1e-9, nesterov=True)),
    (SGD, dict(momentum=0.9, dampening=1)),
    (Adagrad, dict(eps=0.0, lr_decay=0, initial_accumulator_value=0)),
    (RMSprop, dict(alpha=0.0, eps=0)),
    (Adam, dict(betas=(0.0, 0.0))),
    (AdamW, dict(betas=[0.9, 0.99])),
    (LAMB, dict(trust_clip=[0, 10], trust_ratio=False)),
    (LAMB, dict(trust_clip=(0.0, 0.0))),
    (LAMB, dict(trust_clip=(0.1, math.inf))),
    (LARS, dict(trust_coefficient=0.0, momentum=0.0)),
]


@pytest.mark.parametrize(("cls", "kwargs"), GOOD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_bounds_themselves_are_accepted(cls: Any, kwargs: dict[str, Any]) -> None:
    params = [p.requires_grad_() for p in initial((2, 2), (3,))]
    opt = cls(params, **kwargs)
    for step in range(3):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
    assert all(torch.isfinite(p).all() for p in params) or kwargs.get("lr") == 10**6


@pytest.mark.parametrize(
    ("cls", "typo", "meant"),
    [
        (AdamW, "weight_deacy", "weight_decay"),
        (AdamW, "weightdecay", "weight_decay"),
        (Adam, "beta", "betas"),
        (SGD, "momentun", "momentum"),
        (SGD, "nestorov", "nesterov"),
        (LAMB, "trust_ration", "trust_ratio"),
        (LARS, "trust_coeficient", "trust_coefficient"),
    ],
)
def test_a_typo_in_a_group_is_refused(cls: Any, typo: str, meant: str) -> None:
    """torch keeps unknown options, which then have no effect."""
    (p,) = initial((2, 2))
    with pytest.raises(ValueError, match=f"unknown option '{typo}' in a param group: did you mean '{meant}'"):
        cls([{"params": [p], typo: 0.1}])


def test_entries_of_engines_and_schedules_in_a_group_are_accepted() -> None:
    (p,) = initial((2, 2))
    group = {"params": [p], "initial_lr": 0.1, "name": "all", "foreach": None, "fused": None, "lr_mult": 2.0}
    assert AdamW([group]).param_groups[0]["name"] == "all"


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.complex64: distopt's rules are for real numbers"):
        AdamW([torch.ones(2, dtype=torch.complex64)])


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = SGD(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradients.*nn.Embedding\(sparse=False\)"):
        opt.step()
