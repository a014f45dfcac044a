"""Small questions about tensors that are plain or DTensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PAIRS = 8  # lists that are kept: weights and gradients of a few param groups, and of all of them


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, and a plain tensor as it is."""
    # By attribute, since importing DTensor takes half a second that users of plain tensors need not wait.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each tensor, without autograd; a tenth of the time of `to_local`."""
    # Private: torch 2.13's to_local returns this outside of autograd, of a parameter a new view of it.
    return [getattr(t, "_local_tensor", t) for t in tensors]


def placements_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Returns the placements of each tensor; None for a plain one."""
    return [getattr(t, "placements", None) for t in tensors]


class Alike:
    """Whether tensors are laid out as their parameters: plain, or DTensors of the same placements.

    Placements take long to compare, and are those of the step before: pairs of lists that were found alike are kept,
    and known again by their specifications, which are objects that nobody changes.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[list[Any], list[Any]]] = []

    def __call__(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
        pair = _specs(params), _specs(tensors)
        if any(all(map(same, pair, kept)) for kept in self._kept):
            return True
        if placements_of(params) != placements_of(tensors):
            return False
        self._kept = [*self._kept[1 - _PAIRS :], pair]
        return True


def same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two lists have the same objects."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _specs(tensors: Iterable[Tensor]) -> list[Any]:
    """Returns what has the placements of each tensor: an object that DTensors share; None for a plain one."""
    # Private: torch 2.13's `placements` asks this in Python.
    return [getattr(t, "_spec", None) or getattr(t, "placements", None) for t in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a parameter's state and of its master: float32, or the parameter's own if that is wider."""
    return torch.promote_types(dtype, torch.float32)


class Trained(NamedTuple):
    """The parameters of a param group that are trained, and their gradients, each of which was read once.

    Attributes:
        params: The parameters that an optimizer may update, as `trained` gives them.
        stepped: Those of them that have a gradient.
        grads: These gradients.
    """

    params: list[Tensor]
    stepped: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Trained:
        """Reads the gradients of parameters."""
        every = [p.grad for p in params]
        grads = [g for g in every if g is not None]
        if len(grads) == len(every):
            return cls(list(params), list(params), grads)
        stepped = [p for p, g in zip(params, every) if g is not None]
        return cls([p for p, g in zip(params, every) if g is not None or p.requires_grad], stepped, grads)


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that an optimizer may update: they require a gradient, or have one from earlier."""
    return [p for p in params if p.requires_grad or p.grad is not None]


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that have a gradient."""
    return [p for p in params if p.grad is not None]
