"""Detection of changes that a closure makes to existing gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from distopt.layout import local


class GradientWatch:
    """Watches gradients while a closure runs, without reading values or keeping a gradient alive.

        with GradientWatch(params) as watch:
            closure()

    Args:
        params: The parameters whose gradients to watch.

    Attributes:
        found: Whether there were gradients before the block.
        changed: Whether a gradient was computed, cleared or written to. Valid after the block.
        added: Whether the block added to existing gradients instead of clearing them first. Valid after the block.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self.found = self.changed = self.added = False

    def __enter__(self) -> GradientWatch:
        self._marks = [_Mark(p, p.grad) for p in self._params if p.grad is not None]
        self.found = bool(self._marks)
        # A parameter that FSDP2 shards is no leaf of the graph, so hooks do not see it; `_Mark.grew` does.
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
    """A parameter's gradient before the block: the tensor, and the number of writes to it."""

    __slots__ = ("_grad", "_writes", "param")

    def __init__(self, param: Tensor, grad: Tensor) -> None:
        self.param = param
        self._grad = weakref.ref(grad)
        self._writes = _writes(grad)

    @property
    def untouched(self) -> bool:
        grad = self.param.grad  # a freed gradient's address may be reused
        return grad is not None and grad is self._grad() and _writes(grad) == self._writes

    @property
    def grew(self) -> bool:
        """Whether FSDP2 has added to it: torch 2.13 writes to the local shard for that, but clearing writes to both."""
        grad = self.param.grad
        if grad is None or not _is_sharded(grad) or grad is not self._grad():
            return False
        before, now = self._writes, _writes(grad)
        return now[0] == before[0] and now[1] != before[1]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _writes(grad: Tensor) -> tuple[int, int]:
    """Returns the numbers of writes to a gradient and to its local shard."""
    if not _is_sharded(grad):
        return grad._version, 0
    with torch.no_grad():  # taking the local shard must not enter the graph
        return grad._version, local(grad)._version
