"""Batches made in a thread while the step before is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Makes batch i + 1 in a thread once batch i is taken.

    The batches are a pure function of their index: a run that resumes, or passes over batches, asks for another index,
    and gets what it would have got without a thread.

    Args:
        make: Makes the batch of an index. It is never called twice at the same time.
        pin: Copy the batches to pinned memory, from which `to(device, non_blocking=True)` does not wait.
    """

    def __init__(self, make: Callable[[int], T], pin: bool = False) -> None:
        self._make, self._pin = make, pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="distopt-batches")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, index: int) -> T:
        """Return the batch of an index, and start to make the one after it; raises what `make` raises."""
        if self._next is not None and self._next[0] != index:
            wait([self._next[1]])
            self._next = None
        batch = self._made(index) if self._next is None else self._next[1].result()
        self._next = index + 1, self._thread.submit(self._made, index + 1)
        return batch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _made(self, index: int) -> T:
        batch: Any = self._make(index)
        return batch.pin_memory() if self._pin else batch
