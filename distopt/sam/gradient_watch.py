"""What a closure does to the gradients which were there before it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from distopt.layout import local


class GradientWatch:
    """Watches gradients while a closure runs. Reads no values, and keeps no gradient alive.

        with GradientWatch(params) as watch:
            closure()

    Attributes, once the block has ended:
        found: whether there were gradients before it.
        changed: whether one of them was computed, cleared or written to.
        added: whether gradients which were there before were added to, rather than cleared first.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self.found = self.changed = self.added = False

    def __enter__(self) -> GradientWatch:
        self._marks = [_Mark(p, p.grad) for p in self._params if p.grad is not None]
        self.found = bool(self._marks)
        # A parameter which FSDP2 shards is no leaf of the graph: hooks see the others only, `_Mark.grew` those.
        leaves = [mark.param for mark in self._marks if mark.param.requires_grad and not _is_sharded(mark.param)]
        self._hook = register_multi_grad_hook(leaves, self._at_first_gradient, mode="any") if leaves else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
        came = sum(p.grad is not None for p in self._params) != len(self._marks)
        self.changed = came or not all(mark.untouched for mark in self._marks)
        self.added = self.added or any(mark.grew for mark in self._marks)

    def _at_first_gradient(self, _: Tensor) -> None:
        self.added = any(mark.untouched for mark in self._marks)


class _Mark:
    """A parameter's gradient as it was: which tensor, and how often that had been written to."""

    __slots__ = ("_grad", "_writes", "param")

    def __init__(self, param: Tensor, grad: Tensor) -> None:
        self.param = param
        self._grad = weakref.ref(grad)
        self._writes = _writes(grad)

    @property
    def untouched(self) -> bool:
        grad = self.param.grad  # the address of one that has been freed may be another's by now
        return grad is not None and grad is self._grad() and _writes(grad) == self._writes

    @property
    def grew(self) -> bool:
        """Whether FSDP2 has added to it, which torch 2.13 does on the local shard; clearing writes to both."""
        grad = self.param.grad
        if grad is None or not _is_sharded(grad) or grad is not self._grad():
            return False
        before, now = self._writes, _writes(grad)
        return now[0] == before[0] and now[1] != before[1]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _writes(grad: Tensor) -> tuple[int, int]:
    """How often a gradient, and its local shard, have been written to."""
    if not _is_sharded(grad):
        return grad._version, 0
    with torch.no_grad():  # where a local shard is no operation of the graph
        return grad._version, local(grad)._version
