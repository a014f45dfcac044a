"""The places of the local shards in each parameter, according to the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout import ShardLayout, blocks_shape, local
from distopt.layout.places import Box, Place, Run, full_place
from distopt.proof.content import content, cover, signed


class Part(NamedTuple):
    """A local shard of a parameter, or of state with an element for each few of its elements.

    Attributes:
        layer: The index of the parameter.
        tensor: The local tensor.
        shape: The full shape.
        place: The elements of the full tensor that the local one has.
    """

    layer: int
    tensor: Tensor
    shape: Sequence[int]
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
        if (per := elements_per(layout, owner, tensor)) > 1:
            found.append(_of_blocks(layout, owner, local(tensor).view(-1), per))
            continue
        wanted = layout.state_numel(owner)
        if not hasattr(owner, "placements") and local(tensor).numel() not in (wanted, owner.numel()):
            raise ValueError(
                f"a tensor of {local(tensor).numel()} elements belongs to a parameter of shape {tuple(owner.shape)}, "
                f"of which this rank steps {wanted}"
            )
        for segment, shard, place in zip(segments, layout.split(owner, tensor), layout.places(owner)):
            found.append(Part(segment.layer, shard, layout.full_shape(layout.params[segment.layer]), place))
    return found


def elements_per(layout: ShardLayout, owner: Tensor, tensor: Tensor) -> int:
    """Returns the elements of a parameter for each element of its state: 1, but for codes and scales of blocks."""
    return 1 if layout.flat or not tensor.numel() else max(1, owner.numel() // tensor.numel())


def _of_blocks(layout: ShardLayout, owner: Tensor, mine: Tensor, per: int) -> Part:
    (segment,), (place,) = layout.segments[owner], layout.places(owner)
    shape = blocks_shape(layout.full_shape(owner), per)
    if isinstance(place, Run):
        return Part(segment.layer, mine, shape, Run(place.start // per, place.length // per))
    columns, inner = place.indices[1], math.prod(layout.full_shape(owner)[2:])
    assert isinstance(columns, range)  # `check_blocks`
    own = range(columns.start * inner // per, columns.stop * inner // per)
    return Part(segment.layer, mine, shape, Box((place.indices[0], own)))


def sums(layout: ShardLayout, some: Iterable[Part]) -> Tensor:
    """Returns the hash of the local shards of each parameter: int64, shape [num_layers]."""
    total, held = torch.zeros(layout.num_layers, dtype=torch.int64, device=layout.device), list(some)
    if held:
        hashes = [content(part.tensor, part.shape, part.place) for part in held]
        layers = torch.tensor([part.layer for part in held], device=total.device)
        total.index_add_(0, layers, torch.stack(hashes).to(total.device))
    return total


def replicated(optimizer: Any) -> Callable[[Tensor, str], bool]:
    """Returns whether a buffer in the state of a tensor that an optimizer updates is complete on every rank."""
    groups = optimizer.param_groups if hasattr(optimizer, "rule") else []
    rules = {p: rule for group in groups if (rule := optimizer.rule(group)).slots for p in group["params"]}

    def is_replicated(owner: Tensor, name: str) -> bool:
        slot = rules[owner].slot(name, owner.shape) if owner in rules else None
        return slot is not None and slot.replicated

    return is_replicated


def full_sums(layout: ShardLayout, buffers: Mapping[Tensor, Tensor]) -> Tensor:
    """As `sums`, of buffers that are complete on every rank, by the tensors whose state they are."""
    total = torch.zeros(layout.num_layers, dtype=torch.int64, device=layout.device)
    for owner, value in buffers.items():
        (segment,) = layout.segments[owner]
        total[segment.layer] = content(value, value.shape, full_place(value.shape))
    return total


def coverage(layout: ShardLayout, some: Iterable[Part]) -> Tensor:
    """Returns the hash of ones at the local places; over all ranks they sum up to that of each full parameter."""
    total = [0] * layout.num_layers
    for part in some:
        total[part.layer] += cover(part.shape, part.place)
    return torch.tensor([signed(number) for number in total], dtype=torch.int64, device=layout.device)


def counted(layout: ShardLayout) -> Tensor:
    """Returns, for each parameter, 1 if this rank contributes it to a sum over all ranks, else 0."""
    once = layout.counted or (True,) * layout.num_layers
    return torch.tensor(once, dtype=torch.int64, device=layout.device)
