"""What a compiled rule needs to know: one specification per rule, which the C and the Triton kernels read.

A kernel computes in float32. Whatever can be computed beforehand is computed here, once, in Python's double precision:
1 - beta of a float32 beta of 0.999 is off by 1e-5, and of 0.9999 by 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCALES = 2  # that may differ between tensors; a third one, lr * ratio, is of every rule


@dataclass(frozen=True)
class Rule:
    """A kernel with its inputs.

    Attributes:
        name: The function in cpu.c and in triton_rules.py.
        buffers: The names of its state buffers, in the order in which the kernel takes them.
        scalars: Its hyper-parameters and what is computed from them, by name, in the order in which the kernel takes
            them.
        scales: What differs between tensors: functions of the number of steps, which is a float or a float64 tensor, by
            name. `rate` is what multiplies the gradient (LARS) where shards bring it.
    """

    name: str
    buffers: tuple[str, ...]
    scalars: dict[str, float]
    scales: dict[str, Callable[[Any], Any]]


def rule(name: str, group: dict[str, Any]) -> Rule:
    """The specification of a kernel, by its name, for the options of a param group."""
    return _RULES[name](group)


def every() -> list[Rule]:
    """All rules, for any options."""
    found = [_sgd(_GROUP | {"momentum": m, "nesterov": n}) for m, n in ((0.0, False), (0.9, False), (0.9, True))]
    found += [_rmsprop(_GROUP | {"centered": c, "momentum": m}) for c in (False, True) for m in (0.0, 0.9)]
    return [*found, _adagrad(_GROUP), _adam(_GROUP, 0.0, 0.0)]


def indices() -> dict[str, int]:
    """The place of every scalar and scale of every rule, as `<rule>__<name>`."""
    return {f"{r.name}__{name}": i for r in every() for names in (r.scalars, r.scales) for i, name in enumerate(names)}


def _sgd(group: dict[str, Any]) -> Rule:
    decay = {"decay": group["weight_decay"]}
    if not group["momentum"]:
        return Rule("sgd", (), decay, {"rate": lambda step: 1.0})
    dampening = group["dampening"]
    # The share of the gradient in the momentum: all of it at the first step.
    scales: dict[str, Callable[[Any], Any]] = {
        "rate": lambda step: 1.0,
        "share": lambda step: 1.0 - dampening * (step != 1.0),
    }
    name = "nesterov" if group["nesterov"] else "momentum"
    return Rule(name, ("momentum_buffer",), decay | {"momentum": group["momentum"]}, scales)


def _adagrad(group: dict[str, Any]) -> Rule:
    scalars = {"decay": group["weight_decay"], "eps": group["eps"]}
    return Rule("adagrad", ("sum",), scalars, {"fall": lambda step: 1.0 / (1.0 + (step - 1.0) * group["lr_decay"])})


def _rmsprop(group: dict[str, Any]) -> Rule:
    scalars = {"decay": group["weight_decay"], "alpha": group["alpha"], "fresh": 1.0 - group["alpha"]}
    scalars |= {"eps": group["eps"], "momentum": group["momentum"]}
    name = "_".join(["rmsprop", *["centered"] * group["centered"], *["momentum"] * bool(group["momentum"])])
    buffers = ["square_avg", *["grad_avg"] * group["centered"], *["momentum_buffer"] * bool(group["momentum"])]
    return Rule(name, tuple(buffers), scalars, {})


def _adam(group: dict[str, Any], coupled: float, decoupled: float) -> Rule:
    beta1, beta2 = group["betas"]
    scalars = {"coupled": coupled, "beta1": beta1, "fresh1": 1.0 - beta1, "beta2": beta2, "fresh2": 1.0 - beta2}
    scalars |= {"eps": group["eps"], "decoupled": decoupled}
    scales: dict[str, Callable[[Any], Any]] = {
        "unbias1": lambda step: 1.0 / (1.0 - beta1**step),
        "unbias2": lambda step: (1.0 - beta2**step) ** -0.5,
    }
    return Rule("adam", ("exp_avg", "exp_avg_sq"), scalars, scales)


_GROUP: dict[str, Any] = dict(weight_decay=0.0, dampening=0.0, eps=0.0, lr_decay=0.0, alpha=0.0, betas=(0.0, 0.0))

_RULES: dict[str, Callable[[dict[str, Any]], Rule]] = {
    "sgd": _sgd,
    "adam": lambda group: _adam(group, group["weight_decay"], 0.0),
    "adamw": lambda group: _adam(group, 0.0, group["weight_decay"]),
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "norms": lambda group: Rule("sgd", (), {"decay": 0.0}, {"rate": lambda step: 1.0}),  # no state moves
}
