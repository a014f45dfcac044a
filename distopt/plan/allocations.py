"""What lives in memory while something runs, by watching every operator: on real tensors, or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records when the storages that operators make come to life, change their size and end.

    Views and what is updated in place cost nothing; `known`: tensors from before, which do not count. C++ code that
    allocates by itself (DDP's buckets) is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # the number of a storage, and by how many bytes it changed
        self._sizes: dict[int, int] = {}  # by number
        self._numbers: dict[int, int] = {}  # by address, while the storage lives
        self._known = {_address(t) for t in known}
        self._count = 0

    def __enter__(self) -> Allocations:
        own, resize = self, torch.UntypedStorage.resize_
        self._resize = resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP2 frees what it has gathered
            out = resize(storage, size)
            if (number := own._numbers.get(storage._cdata)) is not None:
                own._changed(number, storage.nbytes())
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
            if isinstance(t, Tensor) and (address := _address(t)) not in self._numbers and address not in self._known:
                self._count += 1
                self._numbers[address] = number = self._count
                self._changed(number, t.untyped_storage().nbytes())
                weakref.finalize(t.untyped_storage(), self._ended, address, number)
        return made

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The storages of these tensors."""
        return {self._numbers[a] for t in tensors if (a := _address(t)) in self._numbers}

    def peak(self) -> int:
        """The most bytes that lived at one time."""
        now = most = 0
        for _, change in self.events:
            now += change
            most = max(most, now)
        return most

    def _changed(self, number: int, size: int) -> None:
        self.events.append((number, size - self._sizes.get(number, 0)))
        self._sizes[number] = size

    def _ended(self, address: int, number: int) -> None:
        self._numbers.pop(address, None)
        self._changed(number, 0)
        del self._sizes[number]


def _address(tensor: Tensor) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.untyped_storage()._cdata
