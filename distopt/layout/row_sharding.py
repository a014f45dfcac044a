"""Rows of many parameters, one run for each rank: in a matrix that one collective moves, or where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def width(param: Tensor, world: int) -> int:
    """Elements of a parameter that go to each rank: those of ceil(n / world) rows, as DTensor's Shard(0) cuts n."""
    return param.numel() // max(1, _rows(param)) * -(-_rows(param) // world)


def span(param: Tensor, world: int, rank: int) -> tuple[int, int]:
    """Start and number of the elements of a rank's rows; the last ranks may have fewer, or none. All have a 0-D one."""
    if param.ndim == 0:
        return 0, 1
    step = width(param, world)
    start = min(rank * step, param.numel())
    return start, min(step, param.numel() - start)


def rows_of(param: Tensor, world: int, rank: int) -> int:
    """How many rows of a parameter, which may have no elements, go to a rank."""
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
    """Writes rows of the tensors into those of a matrix [ranks, sum of the widths]; rounds to its dtype.

    The matrix's rows are those of the ranks from `first` on. What a rank lacks rows for is left as it is. A 0-D tensor
    goes to every rank.
    """
    pairs = list(_views(matrix, tensors, world, first, scalars=len(matrix)))
    if pairs:  # none of parameters without elements
        torch._foreach_copy_([inside for inside, _ in pairs], [outside for _, outside in pairs])


def unpack(tensors: Sequence[Tensor], matrix: Tensor, world: int, first: int = 0) -> None:
    """The reverse. A 0-D tensor is the first rank's, so that all ranks have the same."""
    pairs = list(_views(matrix, tensors, world, first, scalars=1 if first == 0 else 0))
    if pairs:
        torch._foreach_copy_([outside for _, outside in pairs], [inside for inside, _ in pairs])


def swap(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Gives all other ranks this rank's rows of the tensors, and takes theirs, each from where it is to where it goes.

    For gloo: no copy and no scratch memory, and many small messages cost it no more than a few long ones.
    """
    works = []
    for tensor in tensors:
        rows = [tensor.view(-1).narrow(0, *span(tensor, group.size(), rank)) for rank in range(group.size())]
        owners = range(group.size()) if tensor.ndim else range(1)
        mine = rows[group.rank()]
        for other in (rank for rank in range(group.size()) if rank != group.rank()):
            if group.rank() in owners and mine.numel():
                works.append(group.send([mine], other, 0))  # dist.isend's checks cost as much as the message
            if other in owners and rows[other].numel():
                works.append(group.recv([rows[other]], other, 0))
    for work in works:
        work.wait()


def over_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors of this device go by gloo in this group."""
    return group._get_backend(device).name() == "gloo"


def _views(
    matrix: Tensor, tensors: Sequence[Tensor], world: int, first: int, scalars: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the matrix and of the tensors that hold the same elements, in as few pairs as can be."""
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
