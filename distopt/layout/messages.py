"""Messages between ranks, in place of collectives that change the bits, or that take more bytes or time over gloo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def assemble(full: Tensor, groups: Iterable[dist.ProcessGroup]) -> None:
    """Fills a flat tensor, of which each rank has other elements and zeros elsewhere, bit for bit.

    The sum is one of bytes: of numbers it has no -0.0 and only one nan, and a remainder of 16 bits may look like any.
    """
    for group in groups:
        dist.all_reduce(full.view(torch.uint8), group=group)


def over_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Returns whether the group communicates tensors of this device by gloo."""
    return group._get_backend(device).name() == "gloo"


def others(group: dist.ProcessGroup) -> Iterator[int]:
    """Yields the other ranks of a group, the next one first, so that not all send to the same one."""
    size, rank = group.size(), group.rank()
    return ((rank + i) % size for i in range(1, size))


def send(tensor: Tensor, to: int, group: dist.ProcessGroup) -> dist.Work:
    """Starts a message to a rank of the group; without the checks of `dist.isend`, which cost as much as it does."""
    return group.send([tensor], to, 0)


def receive(tensor: Tensor, source: int, group: dist.ProcessGroup) -> dist.Work:
    """Starts receiving a message from a rank of the group."""
    return group.recv([tensor], source, 0)
