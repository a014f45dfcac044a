"""The place of a shard in its full parameter: which elements a local tensor has, without an index for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout.dtensor import Index, own_indices

_PADDING = 1.05  # of the elements that a rank would have without padding
_CHUNK = 2**20  # elements at once, whose indices take some 40 MB of scratch memory


@dataclass(frozen=True)
class Segment:
    """A run of elements of one layer in a flattened local tensor.

    Attributes:
        layer: The index of the layer.
        start: The first element in the flattened local tensor.
        numel: The number of elements.
        offset: The first element in the flattened full layer; 0 for DTensors, whose placements say that.
    """

    layer: int
    start: int
    numel: int
    offset: int = 0


class Run(NamedTuple):
    """Consecutive elements of the flattened parameter: `length` elements from `start` on."""

    start: int
    length: int


class Box(NamedTuple):
    """The elements at these indices along each dimension of the parameter."""

    indices: tuple[Index, ...]


Place = Run | Box


def full_place(shape: Sequence[int]) -> Run:
    """Returns the place of a full parameter."""
    return Run(0, math.prod(shape))


def size(place: Place) -> int:
    """Returns the number of elements of a place."""
    return place.length if isinstance(place, Run) else math.prod(map(len, place.indices))


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """Returns the dimension along which a parameter is sharded.

    The first one, by rows, unless that pads shards by more than 5 %, as it does the stacked weights of experts at more
    ranks than experts; then the next one that the ranks divide, if there is any. Torch shards other dimensions evenly
    only (2.13).

    Args:
        shape: The shape of the parameter.
        ranks: The ranks among which it is sharded.
    """
    rows = shape[0] if shape else 1
    if -(-rows // ranks) * ranks <= _PADDING * rows:
        return 0
    return next((dim for dim, size in enumerate(shape) if size and size % ranks == 0), 0)


def cuts_blocks(param: Any, shape: Sequence[int], block: int) -> bool:
    """Whether some rank's part of a parameter is no number of blocks of consecutive elements of its rows."""
    placements = enumerate(getattr(param, "placements", ()))
    sharded = [(axis, placement) for axis, placement in placements if not placement.is_replicate()]
    if any(placement.dim > 1 or hasattr(placement, "split_factor") for _, placement in sharded):
        return True
    parts = math.prod(param.device_mesh.size(axis) for axis, placement in sharded if placement.dim)
    return parts > 1 and (shape[1] % parts > 0 or math.prod(shape[1:]) // parts % block > 0)


def own_place(param: Tensor) -> Place:
    """Returns the place of the local elements of a DTensor, or of a plain tensor that is full."""
    return Box(own_indices(param)) if hasattr(param, "placements") else full_place(param.shape)


def global_indices(
    place: Place, shape: Sequence[int], device: torch.device, chunk: int = _CHUNK
) -> Iterator[tuple[int, Tensor]]:
    """Yields the indices in the flattened parameter of the elements at a place, in chunks.

    Values that are a function of them are the same on every layout. Nothing is sent.

    Args:
        place: The elements that a local tensor has.
        shape: The full shape of the parameter.
        device: The device of the indices.
        chunk: The number of elements at once.

    Yields:
        The first element of the chunk in the flattened local tensor, and the indices, int64.
    """
    first = place.start if isinstance(place, Run) else 0
    for start in range(0, total := size(place), chunk):
        run = torch.arange(first + start, first + min(start + chunk, total), device=device)
        yield start, run if isinstance(place, Run) else _of_box(place, shape, run)
        del run


def boxes(place: Place, shape: Sequence[int]) -> Iterator[tuple[int, Box]]:
    """Yields a place as boxes: a run is up to `2 * len(shape) - 1` of them.

    Yields:
        The first element of the box in the flattened local tensor, and the box. Those of a run have ranges as indices.
    """
    if isinstance(place, Box):
        yield 0, place
    elif place.length:
        yield from _runs(place, tuple(shape))


def _runs(run: Run, shape: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
    """Divides a run into what is left of a row (one index of dimension 0), full rows, and the start of another."""
    if len(shape) < 2:
        yield 0, Box((range(run.start, run.start + run.length),) if shape else ())
        return
    row, done = math.prod(shape[1:]), 0
    while done < run.length:
        first, column = divmod(run.start + done, row)
        left = run.length - done
        if column or left < row:
            length = min(left, row - column)
            for start, box in _runs(Run(column, length), shape[1:]):
                yield done + start, Box((range(first, first + 1), *box.indices))
        else:
            length = left // row * row
            yield done, Box((range(first, first + left // row), *map(range, shape[1:])))
        done += length


def _of_box(box: Box, shape: Sequence[int], rest: Tensor) -> Tensor:
    """Returns the indices in the full parameter of elements of a box, given by their place in the box."""
    index, stride = torch.zeros_like(rest), 1
    for own, full in zip(reversed(box.indices), reversed(shape)):
        at = rest % len(own)
        index += stride * (at + own.start if isinstance(own, range) else own.to(rest.device)[at])
        rest, stride = rest // len(own), stride * full
    return index
