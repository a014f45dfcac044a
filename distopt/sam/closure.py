"""What a closure does to the gradients which were there before it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType

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
        self._before = [_Mark(p) for p in self._params]
        marks = [mark for mark in self._before if mark.present]
        self.found = bool(marks)
        # A parameter which FSDP2 shards is no leaf of the graph: hooks see the others only, `_Mark.grew` those.
        leaves = [m.param for m in marks if m.param.requires_grad and not hasattr(m.param, "placements")]

        def at_first_gradient(_: Tensor) -> None:
            self.added = any(mark.untouched for mark in marks)

        self._hook = register_multi_grad_hook(leaves, at_first_gradient, mode="any") if leaves else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.changed = not all(mark.untouched for mark in self._before)
        self.added = self.added or any(mark.grew for mark in self._before)


class _Mark:
    """A parameter's gradient as it was: which tensor, and how often that had been written to."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self._grad = None if param.grad is None else weakref.ref(param.grad)
        self._version, self._writes = (0, 0) if param.grad is None else _writes(param.grad)

    @property
    def present(self) -> bool:
        return self._grad is not None

    @property
    def same(self) -> bool:
        """Whether it is still that tensor; of one that has been freed the address may be another's by now."""
        grad = self.param.grad
        return grad is None if self._grad is None else grad is not None and grad is self._grad()

    @property
    def untouched(self) -> bool:
        grad = self.param.grad
        return self.same and (grad is None or _writes(grad) == (self._version, self._writes))

    @property
    def grew(self) -> bool:
        """Whether FSDP2 has added to it, which torch 2.13 does on the local shard; clearing writes to both."""
        grad = self.param.grad
        if grad is None or not hasattr(grad, "placements") or not self.same:
            return False
        version, writes = _writes(grad)
        return version == self._version and writes != self._writes


def _writes(grad: Tensor) -> tuple[int, int]:
    """How often a gradient, and its local shard, have been written to."""
    return grad._version, local(grad)._version
