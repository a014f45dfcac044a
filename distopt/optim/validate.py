"""Checks of arguments: of every hyper-parameter of a param group, and of numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, MutableMapping
from numbers import Real
from typing import Any

from torch import Tensor

from distopt.bounds import Bound, is_number, number
from distopt.bounds.optimizer import BOUNDS

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
