"""Checks of arguments: the bounds of every hyper-parameter of a param group, and numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from distopt.bounds import Bound, choice, integer, is_number, number, or_null, pair, switch

_DECAY = number(0.0, 1.0, below=True)  # 1 would keep the first value for ever
# The bound of every option of a param group that is checked.
BOUNDS: dict[str, Bound] = {
    "lr": number(0.0),
    "betas": pair("two numbers in [0, 1)", lambda beta1, beta2: 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0),
    "eps": number(0.0),
    "weight_decay": number(0.0),
    "momentum": _DECAY,
    "alpha": _DECAY,
    "beta3": _DECAY,
    "slow_weight": number(0.0),
    "slow_warmup": or_null(integer(1)),
    "clip_exponent": or_null(number(0.0)),
    "dampening": number(0.0, 1.0),
    "lr_decay": number(0.0),
    "initial_accumulator_value": number(0.0),
    "trust_coefficient": number(0.0),
    "d0": number(0.0, above=True),
    "d_coef": number(0.0, above=True),
    "r": number(0.0),
    "weight_lr_power": number(0.0),
    "trust_clip": or_null(pair("two numbers 0 <= low <= high", lambda low, high: 0.0 <= low <= high, infinite=True)),
    "master_weights": choice("float32", "remainder", "none"),
    "state_bits": choice(32, 16, 8, 4),
    **{
        name: switch()
        for name in (
            *("nesterov", "centered", "maximize", "trust_ratio", "capturable", "cautious", "cautious_decay"),
            "train_mode",
        )
    },
}
# Those of Adafactor, where they are others.
FACTORED: dict[str, Bound] = {
    "eps": Bound("two numbers >= 0, or null and a number >= 0", lambda eps: _are_two_epsilons(eps)),
    "beta2_decay": Bound("a number <= 0", lambda power: is_number(power) and power <= 0.0),  # type: ignore[operator]
    "d": number(1.0),
}
# Those of Muon, besides the others.
MATRICES: dict[str, Bound] = {
    "ns_coefficients": Bound("three numbers", lambda values: _are_numbers(values, 3)),
    "ns_steps": Bound("an integer from 1 to 99", lambda steps: integer(1).accepts(steps) and steps < 100),  # type: ignore[operator]
    "adjust_lr_fn": or_null(choice("original", "match_rms_adamw")),
    "ns_dtype": choice("bfloat16", "float32"),
    "exchange_mib": integer(1),
}
# An lr in mid-run: torch's recursive schedules round to values below 0 where they should end at 0.
_CHANGED_LR = Bound("a finite number", is_number)


def check_group(
    group: MutableMapping[str, Any], defaults: Mapping[str, Any], bounds: Mapping[str, Bound] = BOUNDS
) -> None:
    """Checks a new param group, and converts numbers of other libraries (numpy's scalars) to Python's own.

    Raises:
        ValueError: With value and bound, for the first option that is out of bounds, mistyped or misspelt, and for
            complex parameters.
    """
    if "rule" in group and "rule" not in defaults:
        raise ValueError(
            f"a param group names the rule {group['rule']!r}, and this optimizer has one rule for all groups: use "
            "distopt.Muon, or param_groups without matrices"
        )
    for name, value in group.items():
        if isinstance(value, Tensor) and name == "lr":
            _check_tensor_lr(value, group.get("capturable"))
            value = value.item()
        if name in bounds:
            bounds[name].check(name, value)
        if name not in defaults and (meant := difflib.get_close_matches(name, defaults, n=1, cutoff=0.8)):
            raise ValueError(f"unknown option {name!r} in a param group: did you mean {meant[0]!r}?")
    for name, value in group.items():
        if name == "betas":
            group[name] = (list if isinstance(value, list) else tuple)(map(_plain, value))
        elif isinstance(value, Real) and not isinstance(value, bool) and name in bounds:
            group[name] = _plain(value)
    for param in group["params"]:
        if param.is_complex():
            raise ValueError(f"a parameter has dtype {param.dtype}: distopt's rules are for real numbers")


def check_values(group: Mapping[str, Any], bounds: Mapping[str, Bound] = BOUNDS) -> None:
    """Checks the values that schedules and users have set in a param group, without reading from a GPU.

    Raises:
        ValueError: As `check_group`.
    """
    for name, value in group.items():
        if name != "lr":
            if name in bounds:
                bounds[name].check(name, value)
            continue
        if isinstance(value, Tensor):
            _check_tensor_lr(value, group["capturable"])
            if not value.is_cpu:
                continue
            value = value.item()
        _CHANGED_LR.check(name, value)


def bounded(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """Returns a finite number in [low, high] as a float; raises ValueError for any other value."""
    number(low, high).check(name, value)
    return float(value)


def positive(name: str, value: Any, remedy: str = "") -> float:
    """Returns a finite number > 0 as a float; raises ValueError for any other value."""
    number(0.0, above=True).check(name, value, remedy)
    return float(value)


def _are_two_epsilons(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    return or_null(number(0.0)).accepts(value[0]) and number(0.0).accepts(value[1])


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, Sequence) and len(values) == count and all(map(is_number, values))


def _check_tensor_lr(lr: Tensor, capturable: object) -> None:
    if lr.numel() != 1 or not lr.is_floating_point():  # schedules fill an integer with 0
        raise ValueError(
            f"lr must be a number >= 0 or a floating-point tensor of one, got {lr.dtype} of shape {list(lr.shape)}"
        )
    if not lr.is_cpu and capturable is not True:
        raise ValueError(
            f"lr is a tensor on {lr.device}, and every step would wait for its value: give capturable=True, or a "
            "number, or a tensor on the CPU"
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, Tensor) or type(value) in (int, float) else float(value)
