"""The indices of the elements of a DTensor that are local, as its placements say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Index = range | Tensor  # indices along one dimension, consecutive or arbitrary


def own_indices(param: Any) -> tuple[Index, ...]:
    """Returns the indices of the local elements of a DTensor, along each dimension."""
    indices: list[Index] = [range(length) for length in param.shape]
    mesh, placements = param.device_mesh, param.placements
    coordinate = mesh.get_coordinate()
    sharding = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if sharding and coordinate is None:
        return tuple(range(0) for _ in indices)
    # FSDP2 over tensor or expert parallelism shards what that has left of a dimension (torch 2.13's _StridedShard).
    for axis in sorted(sharding, key=lambda axis: hasattr(placements[axis], "split_factor")):
        dim = placements[axis].dim
        left = getattr(placements[axis], "split_factor", 1) // math.prod(_sizes_after(param, axis))
        pieces = _chunks(indices[dim], max(1, left))
        held = [_chunks(piece, mesh.size(axis))[coordinate[axis]] for piece in pieces]
        indices[dim] = held[0] if len(held) == 1 else torch.cat([as_tensor(index) for index in held])
    return tuple(map(_consecutive, indices))


def as_tensor(index: Index) -> Tensor:
    """Returns indices as an int64 tensor."""
    return torch.arange(index.start, index.stop) if isinstance(index, range) else index


def misread_by_torch(param: Any) -> bool:
    """Whether torch takes some rank's part of a DTensor for other rows than FSDP2 has given it.

    Where tensor or expert parallelism and then FSDP2 divide a dimension with a remainder, torch 2.13's checkpoints and
    `distribute_tensor` may divide it in the other order. The same on every rank.
    """
    for axis, placement in enumerate(getattr(param, "placements", ())):
        parts, sizes = getattr(placement, "split_factor", 1), _sizes_after(param, axis)
        if parts == 1 or parts != math.prod(sizes):
            continue
        rows, ranks = range(param.shape[placement.dim]), param.device_mesh.size(axis)
        if len(rows) % (parts * ranks) and _made(rows, ranks, sizes) != _read(rows, ranks, sizes):
            return True
    return False


def _made(rows: Index, ranks: int, sizes: Sequence[int]) -> list[list[int]]:
    """Returns the rows of each rank, by its rank of FSDP2 and by its place along the other axes, as FSDP2 divides."""
    return [as_tensor(_chunks(piece, ranks)[i]).tolist() for i in range(ranks) for piece in _divided(rows, sizes)]


def _read(rows: Index, ranks: int, sizes: Sequence[int]) -> list[list[int]]:
    """As `_made`, as torch reads the placements: those of a rank of FSDP2 from all pieces, then along the others."""
    pieces = [_chunks(piece, ranks) for piece in _chunks(rows, math.prod(sizes))]
    joined = [torch.cat([as_tensor(piece[i]) for piece in pieces]) for i in range(ranks)]
    return [as_tensor(own).tolist() for index in joined for own in _divided(index, sizes)]


def _chunks(index: Index, count: int) -> list[Index]:
    """Splits indices as `torch.chunk` does, with empty chunks at the end where there are too few."""
    step = -(-len(index) // count)
    return [index[i * step : (i + 1) * step] for i in range(count)]


def _divided(index: Index, sizes: Sequence[int]) -> list[Index]:
    """Divides indices by several axes, one after the other."""
    pieces = [index]
    for size in sizes:
        pieces = [chunk for piece in pieces for chunk in _chunks(piece, size)]
    return pieces


def _sizes_after(param: Any, axis: int) -> list[int]:
    """Returns the sizes of the mesh axes after this one that shard the same dimension."""
    dim = getattr(param.placements[axis], "dim", None)
    later = enumerate(param.placements[axis + 1 :], axis + 1)
    return [param.device_mesh.size(i) for i, p in later if dim is not None and getattr(p, "dim", None) == dim]


def _consecutive(index: Index) -> Index:
    """Returns consecutive indices as a range, others as they are."""
    if isinstance(index, range) or not len(index):
        return index if isinstance(index, range) else range(0)
    first = int(index[0])
    run = range(first, first + len(index))
    return run if torch.equal(index, as_tensor(run)) else index
