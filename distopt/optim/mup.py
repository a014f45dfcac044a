"""muP's learning rates and weight decays of param groups, and decay that does not depend on the learning rate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from distopt.bounds import choice, number, switch
from distopt.init import Width

# By class: the row of muP's table. Trust ratios (LAMB, LARS) make updates as large as weights, which it has no row for.
_RULES = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam", "RMSprop": "adam", "Adagrad": "adam"}
_DECOUPLED = ("AdamW",)


def rule_of(optimizer: Optimizer, independent_decay: bool = False) -> str:
    """Returns the row of muP's table for an optimizer: `sgd`, or `adam` for rules that divide by the gradient's size.

    Raises:
        ValueError: For an optimizer that the table does not have, or, where decay is to be independent of the learning
            rate, for one whose decay is a part of the gradient.
    """
    name = type(optimizer).__name__
    if name not in _RULES or any(group.get("trust_ratio") for group in optimizer.param_groups):
        with_ratio = " with trust_ratio=True" if name in _RULES else ""
        raise ValueError(f"{name}{with_ratio} has no row in muP's table: use one of {', '.join(_RULES)} without it")
    if independent_decay:
        check_decoupled(optimizer)
    return _RULES[name]


def check_decoupled(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer whose weight decay is not lr * weight_decay * p."""
    if (name := type(optimizer).__name__) not in _DECOUPLED or any(
        g.get("trust_ratio") for g in optimizer.param_groups
    ):
        raise ValueError(
            f"independent_decay=True: the decay of {name} passes through its state or its trust ratio; use AdamW"
        )


def check_scaling(lr: Any, rule: Any, independent_decay: Any, scaled: bool) -> None:
    """Checks the arguments of `param_groups` that scale options.

    Raises:
        ValueError: For a value out of bounds, and for a learning rate that is missing.
    """
    switch().check("independent_decay", independent_decay)
    choice("adam", "sgd").check("rule", rule)
    needed = "mup" if scaled else "independent_decay" if independent_decay else ""
    if lr is None:
        if needed:
            raise ValueError(f"{needed} needs the peak of the learning rate, from which groups get theirs: give lr=")
    elif isinstance(lr, Tensor):
        raise ValueError("lr must be a number here, got a tensor: param groups get multiples of it")
    else:
        number(0, above=bool(needed)).check("lr", lr)
    if independent_decay and rule == "sgd":
        raise ValueError("independent_decay=True: SGD's decay is a part of the gradient; use AdamW and rule=adam")


def scale(group: dict[str, Any], width: Width, lr: float, rule: str, independent_decay: bool) -> None:
    """Scales the learning rate of a param group, and its weight decay so that decay per step does not change.

    lr <- lr * m                              m: the factor of the width
    weight_decay <- weight_decay / m          so that lr * weight_decay is that of the base model
    weight_decay <- weight_decay / (lr * m)   with independent decay: p <- p - s(t) (lr m direction + weight_decay
    p)
    """
    peak = float(group.get("lr", lr))
    number(0).check("lr", peak)
    multiplier = width.lr(rule)
    group["lr"] = peak * multiplier
    group["weight_decay"] = group["weight_decay"] / (group["lr"] if independent_decay else multiplier)
