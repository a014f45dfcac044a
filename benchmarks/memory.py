"""Memory of this process: of the device that it computes on."""

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
    """The most memory in use at one time beyond what there was when this was made.

    On a GPU what torch's allocator has given out. On the CPU the resident memory of the process, by the kernel
    (VmHWM less RssFile): all that lives, also what gloo and C++ hold, without code that was read from files. 0 where
    there is no Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if self.gpu else _anonymous("VmRSS")

    def reset(self) -> None:
        """What was freed before counts no more."""
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_peak()

    def bytes(self) -> int:
        """The peak since `reset`."""
        return (torch.cuda.max_memory_allocated() if self.gpu else _anonymous("VmHWM")) - self._before


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[int]]:
    """The most memory that a block takes beyond what there was, in bytes."""
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
    if before:  # what kernels allocate, torch's and ours, no operator returns
        peak[0] = max(peak[0], _kib(_STATUS)["VmHWM"] - before)


def available() -> int:
    """Bytes of main memory that a program may still take; 0 where there is no Linux."""
    return _kib(Path("/proc/meminfo")).get("MemAvailable", 0)


def _forget_peak() -> bool:
    """Has Linux count the peak of this process's memory anew; False where it cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or a temporary might lie in what was freed before
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
    """The most that lives at one time of what operators make; views and what is updated in place cost nothing."""

    def __init__(self, peak: list[int]) -> None:
        super().__init__()
        self.peak = peak
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                storage = t.untyped_storage()
                self.held[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage.data_ptr(), None)
        self.peak[0] = max(self.peak[0], sum(self.held.values()))
        return made
