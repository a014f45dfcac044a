"""The places of the local shards in each parameter, according to the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout import ShardLayout, local
from distopt.proof.content import Box, Index, Place, Run, content, cover, signed


class Part(NamedTuple):
    """A local shard: the index of the parameter, the tensor, and the elements of the parameter that it has."""

    layer: int
    tensor: Tensor
    place: Place


def parts(layout: ShardLayout, of: Callable[[Tensor], Tensor | None] = Tensor.detach) -> list[Part]:
    """Returns the local shards of the tensors of a layout, or of tensors that are laid out alike.

    Args:
        layout: The layout.
        of: Maps a tensor of the layout to itself, its gradient or its state; None if there is none.

    Raises:
        ValueError: If such a tensor is not laid out as its parameter.
    """
    found = []
    for owner, segments in layout.segments.items():
        tensor = of(owner)
        if tensor is None or tensor.is_sparse:
            continue
        if hasattr(owner, "placements"):
            (shard,) = layout.split(owner, tensor)
            found.append(Part(segments[0].layer, shard, Box(own_indices(owner))))
            continue
        wanted = layout.state_numel(owner)
        if local(tensor).numel() not in (wanted, owner.numel()):
            raise ValueError(
                f"a tensor of {local(tensor).numel()} elements belongs to a parameter of shape {tuple(owner.shape)}, "
                f"of which this rank steps {wanted}"
            )
        for segment, shard in zip(segments, layout.split(owner, tensor)):
            found.append(Part(segment.layer, shard, Run(segment.offset, segment.numel)))
    return found


def sums(layout: ShardLayout, some: Iterable[Part]) -> Tensor:
    """Returns the hash of the local shards of each parameter: int64, shape [num_layers]."""
    total, held = torch.zeros(layout.num_layers, dtype=torch.int64, device=layout.device), list(some)
    if held:
        hashes = [content(part.tensor, layout.full_shape(layout.params[part.layer]), part.place) for part in held]
        layers = torch.tensor([part.layer for part in held], device=total.device)
        total.index_add_(0, layers, torch.stack(hashes).to(total.device))
    return total


def coverage(layout: ShardLayout, some: Iterable[Part]) -> Tensor:
    """Returns the hash of ones at the local places; over all ranks they sum up to that of each full parameter."""
    total = [0] * layout.num_layers
    for part in some:
        total[part.layer] += cover(layout.full_shape(layout.params[part.layer]), part.place)
    return torch.tensor([signed(number) for number in total], dtype=torch.int64, device=layout.device)


def counted(layout: ShardLayout) -> Tensor:
    """Returns, for each parameter, 1 if this rank contributes it to a sum over all ranks, else 0."""
    once = layout.counted or (True,) * layout.num_layers
    return torch.tensor(once, dtype=torch.int64, device=layout.device)


def own_indices(param: Any) -> tuple[Index, ...]:
    """Returns the indices of the local elements of a DTensor, along each dimension."""
    indices: list[Index] = [range(length) for length in param.shape]
    coordinate = param.device_mesh.get_coordinate()
    for axis, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        if coordinate is None:
            return tuple(range(0) for _ in indices)
        ranks, own = param.device_mesh.size(axis), coordinate[axis]
        # FSDP2 over tensor parallelism (torch 2.13's _StridedShard) shards each of the existing shards.
        pieces = _chunks(indices[placement.dim], getattr(placement, "split_factor", 1))
        held = [_chunks(piece, ranks)[own] for piece in pieces]
        indices[placement.dim] = held[0] if len(held) == 1 else torch.cat([_tensor(index) for index in held])
    return tuple(map(_consecutive, indices))


def _chunks(index: Index, count: int) -> list[Index]:
    """Splits indices as `torch.chunk` does, with empty chunks at the end where there are too few."""
    step = -(-len(index) // count)
    return [index[i * step : (i + 1) * step] for i in range(count)]


def _tensor(index: Index) -> Tensor:
    return torch.arange(index.start, index.stop) if isinstance(index, range) else index


def _consecutive(index: Index) -> Index:
    """Returns consecutive indices as a range, others as they are."""
    if isinstance(index, range) or not len(index):
        return index if isinstance(index, range) else range(0)
    first = int(index[0])
    run = range(first, first + len(index))
    return run if torch.equal(index, _tensor(run)) else index
