"""The memory of this process, on the device that it computes on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATUS = Path("/proc/self/status")


class Peak:
    """The peak of the memory in use, above the memory in use when this object was made.

    On a GPU: the memory that torch's allocator has handed out. On the CPU: the resident memory of the process by the
    kernel's count (VmHWM less RssFile), which includes the allocations of gloo and C++ code, but not code that was read
    from files; 0 if this is not Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if self.gpu else _anonymous("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_peak()

    def bytes(self) -> int:
        """Return the peak since `reset`, in bytes."""
        return (torch.cuda.max_memory_allocated() if self.gpu else _anonymous("VmHWM")) - self._before


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[int]]:
    """Yield a list whose only element is, after the block, the peak of its memory above that before it, in bytes."""
    peak = [0]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    before = _kib(_STATUS)["VmRSS"] if _forget_peak() else 0
    with _Allocations(peak):
        yield peak
    if before:  # operators do not return the temporaries of kernels, torch's or ours
        peak[0] = max(peak[0], _kib(_STATUS)["VmHWM"] - before)


def available() -> int:
    """Return the bytes of main memory that are available; 0 if this is not Linux."""
    return _kib(Path("/proc/meminfo")).get("MemAvailable", 0)


def _forget_peak() -> bool:
    """Reset the peak of the memory of this process; returns False where that is impossible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise a temporary might reuse memory that was freed before
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _anonymous(name: str) -> int:
    status = _kib(_STATUS)
    return status.get(name, 0) - status.get("RssFile", 0)


def _kib(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


class _Allocations(TorchDispatchMode):
    """A dispatch mode that records the peak of what operators allocate; views and in-place updates allocate nothing."""

    def __init__(self, peak: list[int]) -> None:
        super().__init__()
        self.peak = peak
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                storage = t.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak[0] = max(self.peak[0], sum(self.sizes.values()))
        return made
