"""Checks of arguments: the bounds of every hyper-parameter of a param group, and numbers, pairs and integers."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, MutableMapping
from numbers import Real
from typing import Any

from torch import Tensor

# name: (low, high, the bound in words); high is open for the decay rates, where 1 would keep the first value for ever.
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
# An lr in mid-run: torch's recursive schedules round to values below 0 where they should end at 0.
_MOVED_LR = (-sys.float_info.max, math.inf, "a finite number")
_SWITCHES = ("nesterov", "centered", "maximize", "trust_ratio", "capturable")


def check_group(group: MutableMapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks a new param group, and converts numbers of other libraries (numpy's scalars) to Python's own.

    Raises:
        ValueError: With value and bound, for the first option that is out of bounds, mistyped or misspelt, and for
            complex parameters.
    """
    for name, value in group.items():
        if isinstance(value, Tensor) and name == "lr":
            _check_tensor_lr(value, group.get("capturable"))
            value = value.item()
        _check(name, value)
        if name not in defaults and (meant := difflib.get_close_matches(name, defaults, n=1, cutoff=0.8)):
            raise ValueError(f"unknown option {name!r} in a param group: did you mean {meant[0]!r}?")
    for name, value in group.items():
        if name == "betas":
            group[name] = (list if isinstance(value, list) else tuple)(map(_plain, value))
        elif name in _BOUNDS:
            group[name] = _plain(value)
    for param in group["params"]:
        if param.is_complex():
            raise ValueError(f"a parameter has dtype {param.dtype}: distopt's rules are for real numbers")


def check_values(group: Mapping[str, Any]) -> None:
    """Checks the values that schedules and users have set in a param group, without reading from a GPU.

    Raises:
        ValueError: As `check_group`.
    """
    for name, value in group.items():
        if name != "lr":
            _check(name, value)
            continue
        if isinstance(value, Tensor):
            _check_tensor_lr(value, group["capturable"])
            if not value.is_cpu:
                continue
            value = value.item()
        _check_number(name, value, *_MOVED_LR)


def bounded(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """Returns a finite number in [low, high] as a float; raises ValueError for any other value."""
    if not _is_number(value) or not low <= value <= high or value == math.inf:
        most = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be a number >= {low:g}{most}, got {_shown(value)}")
    return float(value)


def positive(name: str, value: Any, remedy: str = "") -> float:
    """Returns a finite number > 0 as a float; raises ValueError for any other value."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {_shown(value)}{remedy and f'; {remedy}'}")
    return float(value)


def check_integer(name: str, value: object, low: int, remedy: str = "") -> None:
    """Raises ValueError unless the value is an integer >= low, and no boolean."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}{remedy and f'; {remedy}'}")


def _check(name: str, value: Any) -> None:
    """Raises ValueError for a bad value of an option of distopt's; other options may have any."""
    if name in _BOUNDS:
        _check_number(name, value, *_BOUNDS[name])
    elif name in _SWITCHES:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {_shown(value)}")
    elif name == "betas":
        if not _is_pair(value) or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in value):
            raise ValueError(f"betas must be two numbers in [0, 1), got {_shown(value)}")
    elif (
        name == "trust_clip"
        and value is not None
        and not (_is_pair(value) and all(_is_number(v) for v in value) and 0.0 <= value[0] <= value[1])
    ):
        raise ValueError(f"trust_clip must be null or two numbers 0 <= low <= high, got {_shown(value)}")


def _check_number(name: str, value: Any, low: float, high: float, bound: str) -> None:
    if not _is_number(value) or not low <= float(value) < high:  # numpy's float32 overflows next to a large bound
        raise ValueError(f"{name} must be {bound}, got {_shown(value)}")


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


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _plain(value: Any) -> Any:
    return value if isinstance(value, Tensor) or type(value) in (int, float) else float(value)


def _shown(value: object) -> str:
    """Returns the value in one short line."""
    if isinstance(value, int) and not _is_number(value) and not isinstance(value, bool):
        return "an integer beyond the largest float"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
