"""Memory of this process: of the device that it computes on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

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
        elif _STATUS.is_file():
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak since `reset`."""
        return (torch.cuda.max_memory_allocated() if self.gpu else _anonymous("VmHWM")) - self._before


def available() -> int:
    """Bytes of main memory that a program may still take; 0 where there is no Linux."""
    return _kib(Path("/proc/meminfo")).get("MemAvailable", 0)


def _anonymous(name: str) -> int:
    status = _kib(_STATUS)
    return status.get(name, 0) - status.get("RssFile", 0)


def _kib(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
