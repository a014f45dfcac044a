"""ZeRO-1's division of parameters by rows: which rows each rank owns, and how they are packed into messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def width(param: Tensor, world: int) -> int:
    """Returns the elements of a rank's share: ceil(n / world) of a parameter's n rows, as in DTensor's Shard(0)."""
    return param.numel() // max(1, _rows(param)) * -(-_rows(param) // world)


def span(param: Tensor, world: int, rank: int) -> tuple[int, int]:
    """Returns the start and the number of the elements of a rank's rows in the flattened parameter.

    The last ranks may have fewer rows, or none. Every rank has a 0-D parameter.
    """
    if param.ndim == 0:
        return 0, 1
    step = width(param, world)
    start = min(rank * step, param.numel())
    return start, min(step, param.numel() - start)


def own_rows(tensor: Tensor, world: int, rank: int) -> Tensor:
    """Returns a flat view of a rank's rows of a full tensor."""
    return tensor.view(-1).narrow(0, *span(tensor, world, rank))


def row_count(param: Tensor, world: int, rank: int) -> int:
    """Returns how many rows of a parameter, which may have no elements, a rank owns."""
    step = -(-_rows(param) // world)
    return max(0, min(step, _rows(param) - rank * step))


def poison_remote_rows(tensors: Sequence[Tensor], world: int, rank: int) -> None:
    """Fills the rows that other ranks own with NaN, so that a stale read of them is seen."""
    for tensor in tensors:
        start, count = span(tensor, world, rank)
        flat = tensor.view(-1)
        flat[:start].fill_(math.nan)
        flat[start + count :].fill_(math.nan)


def pack(matrix: Tensor, tensors: Sequence[Tensor], world: int, first: int = 0) -> None:
    """Copies rows of full tensors into a matrix with one row per rank.

    Args:
        matrix: Shape [ranks, sum of the widths], for the ranks from `first` on; values are rounded to its dtype. The
            places of rows that a rank does not have stay as they are. A 0-D tensor goes to every rank.
        tensors: The full tensors.
        world: The number of ranks that share the rows.
        first: The rank of the matrix's first row.
    """
    pairs = list(_views(matrix, tensors, world, first, scalars=len(matrix)))
    if pairs:  # none of parameters without elements
        torch._foreach_copy_([inside for inside, _ in pairs], [outside for _, outside in pairs])


def unpack(tensors: Sequence[Tensor], matrix: Tensor, world: int, first: int = 0) -> None:
    """Copies the rows of a matrix back into full tensors: the reverse of `pack`.

    A 0-D tensor takes the first rank's value, so that it is the same on all ranks.
    """
    pairs = list(_views(matrix, tensors, world, first, scalars=1 if first == 0 else 0))
    if pairs:
        torch._foreach_copy_([outside for _, outside in pairs], [inside for inside, _ in pairs])


def swap(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sends this rank's rows of full tensors to all other ranks and receives theirs, in place.

    For gloo: it needs no copy and no scratch memory, and many small messages cost no more there than a few long ones.
    """
    works = []
    for tensor in tensors:
        rows = [own_rows(tensor, group.size(), rank) for rank in range(group.size())]
        senders = range(group.size()) if tensor.ndim else range(1)
        mine = rows[group.rank()]
        for other in (rank for rank in range(group.size()) if rank != group.rank()):
            if group.rank() in senders and mine.numel():
                works.append(group.send([mine], other, 0))  # dist.isend's checks cost as much as the message
            if other in senders and rows[other].numel():
                works.append(group.recv([rows[other]], other, 0))
    for work in works:
        work.wait()


def _views(
    matrix: Tensor, tensors: Sequence[Tensor], world: int, first: int, scalars: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields views of the matrix and of the tensors that have the same elements, in as few pairs as possible."""
    start, last = 0, first + len(matrix)
    for tensor in tensors:
        step = width(tensor, world)
        columns = matrix[:, start : start + step]
        start += step
        if tensor.ndim == 0:
            columns = columns[:scalars]
            yield columns, tensor.view(1).expand_as(columns)
        elif step:
            flat = tensor.view(-1)[first * step : last * step]
            full = flat.numel() // step  # ranks that have as many rows as any
            yield columns[:full], flat[: full * step].view(full, step)
            if rest := flat.numel() - full * step:
                yield columns[full, :rest], flat[full * step :]


def _rows(param: Tensor) -> int:
    return param.shape[0] if param.ndim else 1
