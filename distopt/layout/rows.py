"""Rows of many parameters side by side: one matrix with a row for each rank, which one collective moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
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


def pack(matrix: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes each rank's rows of the tensors into its row of a matrix [world, sum of the widths]; rounds to its dtype.

    What a rank lacks rows for is left as it is. A 0-D tensor goes to every rank.
    """
    pairs = list(_views(matrix, tensors))
    torch._foreach_copy_([inside for inside, _ in pairs], [outside for _, outside in pairs])


def unpack(tensors: Sequence[Tensor], matrix: Tensor) -> None:
    """The reverse. A 0-D tensor is the first rank's, so that all ranks have the same."""
    pairs = list(_views(matrix, tensors, scalars=1))
    torch._foreach_copy_([outside for _, outside in pairs], [inside for inside, _ in pairs])


def _views(matrix: Tensor, tensors: Sequence[Tensor], scalars: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the matrix and of the tensors that hold the same elements, in as few pairs as can be."""
    world, start = matrix.shape[0], 0
    for tensor in tensors:
        step, flat = width(tensor, world), tensor.view(-1)
        columns = matrix[:, start : start + step]
        start += step
        if tensor.ndim == 0:
            columns = columns[:scalars]
            yield columns, flat.expand_as(columns)
        elif step:
            full = flat.numel() // step  # ranks that have as many rows as any
            yield columns[:full], flat[: full * step].view(full, step)
            if rest := flat.numel() - full * step:
                yield columns[full, :rest], flat[full * step :]


def _rows(param: Tensor) -> int:
    return param.shape[0] if param.ndim else 1
