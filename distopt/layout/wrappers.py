"""The optimizers inside the wrappers that SAM, Accelerate and DeepSpeed put around an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def optimizer_chain(optimizer: Any) -> Iterator[Any]:
    """Yields an optimizer and then, from the outside in, each optimizer that it wraps.

    A wrapper is any object whose attribute `optimizer` has `param_groups`: not every wrapper of DeepSpeed is a
    `torch.optim.Optimizer`.
    """
    while hasattr(optimizer, "param_groups"):
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def innermost(optimizer: Any) -> Any:
    """Returns the optimizer that owns the state, inside all wrappers; one without a wrapper is returned itself."""
    return [optimizer, *optimizer_chain(optimizer)][-1]
