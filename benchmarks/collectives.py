"""Communication: the collectives that torch starts, and the bytes that the kernel sends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.layout import local

_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # of torch's functional collectives, those that send nothing


class Collectives(TorchDispatchMode):
    """A dispatch mode that records every collective, those of DDP's buckets included.

        sent = k (N-1)/N * size          k is 2 for an all-reduce, 1 for others; size is that of the unsharded tensor
        sent = size                      for a message to one rank
        sent = the rows of other ranks   for an all-to-all

    CommDebugMode of torch 2.13 hooks modules, and warns.

    Attributes:
        seen: The names of the collectives.
        bytes: The sum of their sizes.
        sent: The bytes that each of N ranks sends by the best algorithm (a ring), whatever the backend does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.bytes = 0
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # whose own dispatch calls the collectives
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if func.namespace == "c10d" or (func.namespace == "_c10d_functional" and operation not in _LOCAL):
            size = max(nbytes(_tensors(side)) for side in (*args, result))
            self.seen.append(str(func))
            self.bytes += size
            self.sent += _sent(operation, args, size)
        return result


def written() -> int:
    """Return the bytes that this process has written, sockets (gloo over TCP) included; 0 if this is not Linux."""
    if not Path("/proc/self/io").is_file():
        return 0
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the local tensors."""
    return sum(local(t).numel() * t.element_size() for t in tensors)


def _sent(operation: str, args: tuple[Any, ...], size: int) -> float:
    """Return the bytes of a collective's tensor that this rank sends."""
    group = next((dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)), dist.group.WORLD)
    assert group is not None
    match operation:
        case "send":
            return size
        case "recv_":
            return 0.0
        case "alltoall_base_" if args[4]:  # rows for each rank
            rows = sum(args[4])
            return nbytes([args[1]]) * (rows - args[4][group.rank()]) / max(1, rows)
    return size * (1 + ("all" in operation and "reduce" in operation)) * (group.size() - 1) / group.size()


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value) if isinstance(value, (Tensor, list, tuple)) else []
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
