"""What goes over the wire: the collectives that torch starts, and the bytes that the kernel has sent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.layout import local


class Collectives(TorchDispatchMode):
    """Sees every collective, those of DDP's buckets too. CommDebugMode of torch 2.13 hooks modules, and warns.

        sent = k (N-1)/N * size          k is 2 for an all-reduce, 1 for others; size is that of the whole tensor
        sent = size                      of a message to one rank; of an all-to-all that leaves out the rank's own rows

    seen: their names. bytes: the sum of their sizes. sent: what each of N ranks sends by the best algorithm (a ring),
    whatever the backend does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.bytes = 0
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            size = max((nbytes(_tensors(side)) for side in args), default=0)
            world = next((dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject)), 1)
            self.seen.append(str(func))
            self.bytes += size
            self.sent += _share(func.overloadpacket.__name__, args, world) * size
        return func(*args, **(kwargs or {}))


def written() -> int:
    """Bytes that this process has written, to sockets too: all that gloo sends over TCP. 0 where there is no Linux."""
    if not Path("/proc/self/io").is_file():
        return 0
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The memory of the local parts."""
    return sum(local(t).numel() * t.element_size() for t in tensors)


def _share(operation: str, args: tuple[Any, ...], world: int) -> float:
    """Which part of a collective's tensor a rank sends."""
    match operation:
        case "send":
            return 1.0
        case "recv_":
            return 0.0
        case "alltoall_base_" if args[4]:  # rows for each rank
            return 1.0 if min(args[4]) == 0 else (world - 1) / world
    return (1 + ("allreduce" in operation)) * (world - 1) / world


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value) if isinstance(value, (Tensor, list, tuple)) else []
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
