"""The bounds of every hyper-parameter, checked when a param group is added."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

# name: (low, high, what the bound says); high is open for the decay rates, where 1 would keep the first value for ever.
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "lr": (0.0, math.inf, "a number >= 0"),
    "eps": (0.0, math.inf, "a number >= 0"),
    "weight_decay": (0.0, math.inf, "a number >= 0"),
    "momentum": (0.0, 1.0, "a number in [0, 1)"),
    "alpha": (0.0, 1.0, "a number in [0, 1)"),
    "dampening": (0.0, math.nextafter(1.0, 2.0), "a number in [0, 1]"),
    "lr_decay": (0.0, math.inf, "a number >= 0"),
    "initial_accumulator_value": (0.0, math.inf, "a number >= 0"),
    "trust_coefficient": (0.0, math.inf, "a number >= 0"),
}
_SWITCHES = ("nesterov", "centered", "maximize", "trust_ratio", "capturable")


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError, with value and bound, for the first option of a param group that is not right."""
    for name, value in group.items():
        if name == "lr" and group.get("capturable") is True and isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        if name in _BOUNDS:
            low, high, bound = _BOUNDS[name]
            if not _is_number(value) or not low <= value < high:
                raise ValueError(f"{name} must be {bound}, got {value!r}")
        elif name in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        elif name == "betas":
            if not _is_pair(value) or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in value):
                raise ValueError(f"betas must be two numbers in [0, 1), got {value!r}")
        elif name == "trust_clip" and value is not None:
            if not _is_pair(value) or not all(_is_number(v) for v in value) or not 0.0 <= value[0] <= value[1]:
                raise ValueError(f"trust_clip must be null or two numbers 0 <= low <= high, got {value!r}")
        elif name not in defaults and (meant := difflib.get_close_matches(name, defaults, n=1, cutoff=0.8)):
            raise ValueError(f"unknown option {name!r} in a param group: did you mean {meant[0]!r}?")
    for param in group["params"]:
        if param.is_complex():
            raise ValueError(f"a parameter has dtype {param.dtype}: distopt's rules are for real numbers")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2
