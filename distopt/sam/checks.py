"""What the arguments of SAM and its kin have to be."""

from __future__ import annotations

import math
from typing import Any

import torch


def bounded(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number in [low, high]; raises ValueError for anything else."""
    if not _is_number(value) or not low <= value <= high or value == math.inf:
        most = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be a number >= {low:g}{most}, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number > 0; raises ValueError for anything else."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        hint = "; leave SAM out for rho = 0" if name.startswith("rho") else ""
        raise ValueError(f"{name} must be a number > 0, got {value!r}{hint}")
    return float(value)


def check_inner(optimizer: Any, kind: type) -> None:
    """Raises ValueError for what is no optimizer, and for one with another SAM (of this kind) inside."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"SAM goes around an optimizer, got {type(optimizer).__name__}: make one first, as in "
            "SAM(distopt.AdamW(model.parameters(), lr=1e-3), rho=0.05)"
        )
    inner: Any = optimizer
    while inner is not None:
        if isinstance(inner, kind):
            raise ValueError(
                f"the optimizer is a {type(inner).__name__} already, and SAM around SAM is neither: use one"
            )
        inner = getattr(inner, "optimizer", None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
