"""Finds an optimizer inside its wrappers: SAM, Accelerate's and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def unwrap_optimizer(optimizer: Any, found: Callable[[Any], bool] = lambda optimizer: False) -> Any:
    """Follows `.optimizer` inwards from a wrapper to the optimizer in it.

    Args:
        optimizer: An optimizer, or a wrapper with the attribute `optimizer`; wrappers may be nested.
        found: Whether to stop here, asked from the outside inwards.

    Returns:
        The first that is found, else the innermost optimizer.
    """
    while not found(optimizer) and hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = inner
    return optimizer
