"""A record of the memory that operators allocate, on real or on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """A dispatch mode that records when storages are allocated, resized and freed.

    Views and in-place updates allocate nothing. Allocations inside C++ code (DDP's buckets) are not seen.

    Args:
        known: Tensors that exist already and do not count.

    Attributes:
        events: The index of a storage, and the change of its size in bytes, in the order of time.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}  # by index
        self._indices: dict[int, int] = {}  # by address, until the storage is freed
        self._known = {_address(t) for t in known}
        self._count = 0

    def __enter__(self) -> Allocations:
        own, resize = self, torch.UntypedStorage.resize_
        self._resize = resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees gathered parameters this way
            out = resize(storage, size)
            if (index := own._indices.get(storage._cdata)) is not None:
                own._changed(index, storage.nbytes())
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and (address := _address(t)) not in self._indices and address not in self._known:
                self._count += 1
                self._indices[address] = index = self._count
                self._changed(index, t.untyped_storage().nbytes())
                weakref.finalize(t.untyped_storage(), self._freed, address, index)
        return made

    def indices(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the indices of the storages of these tensors."""
        return {self._indices[a] for t in tensors if (a := _address(t)) in self._indices}

    def peak(self) -> int:
        """Return the largest number of bytes that were allocated at the same time."""
        now = most = 0
        for _, change in self.events:
            now += change
            most = max(most, now)
        return most

    def _changed(self, index: int, size: int) -> None:
        self.events.append((index, size - self._sizes.get(index, 0)))
        self._sizes[index] = size

    def _freed(self, address: int, index: int) -> None:
        self._indices.pop(address, None)
        self._changed(index, 0)
        del self._sizes[index]


def _address(tensor: Tensor) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.untyped_storage()._cdata
