"""The boxes in which a local tensor and its full layer have the same elements, without an index for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from distopt.layout.dtensor import Index, as_tensor
from distopt.layout.places import Place, Run

Shape = tuple[int, ...]


class Region(NamedTuple):
    """A box of elements of a shard: where it is in the local tensor, and where in the full layer.

    Attributes:
        local_shape: The shape as which the local tensor is viewed.
        local_start: The first index of the box in it, along each dimension.
        shape: The shape as which the full tensor is viewed: its own, or (numel,) of a layer that is sharded flat.
        start: The first index of the box in that.
        size: The elements of the box along each dimension.
    """

    local_shape: Shape
    local_start: Shape
    shape: Shape
    start: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def box(self) -> tuple[Shape, Shape]:
        """What equal copies of a shard have in common."""
        return self.start, self.size

    def of_local(self, tensor: Tensor) -> Tensor:
        """Returns the view of the box in a local tensor."""
        return _view(tensor, self.local_shape, self.local_start, self.size)

    def of_full(self, tensor: Tensor) -> Tensor:
        """Returns the view of the box in a full tensor."""
        return _view(tensor, self.shape, self.start, self.size)

    def within(self, first: int, count: int) -> Region:
        """Returns what is in `count` indices of dimension 0 of the full tensor, as a region of these; maybe empty."""
        start, end = max(self.start[0], first), min(self.start[0] + self.size[0], first + count)
        return Region(
            self.local_shape,
            (self.local_start[0] + start - self.start[0], *self.local_start[1:]),
            (count, *self.shape[1:]),
            (start - first, *self.start[1:]),
            (max(0, end - start), *self.size[1:]),
        )


def regions(place: Place, shape: Sequence[int]) -> list[Region]:
    """Returns the regions of a shard: one, or several where its indices are not consecutive; none if it is empty.

    Args:
        place: Which elements the shard has.
        shape: The full shape of the layer, of one dimension or more.
    """
    full, numel = tuple(shape), math.prod(shape)
    if isinstance(place, Run):
        if place.length == numel:  # may be transposed, which has no flat view
            return [Region(full, (0,) * len(full), full, (0,) * len(full), full)] if numel else []
        return [Region((place.length,), (0,), (numel,), (place.start,), (place.length,))] if place.length else []
    lengths = tuple(map(len, place.indices))
    found = []
    for runs in itertools.product(*(list(_runs(index)) for index in place.indices)):
        local_start = tuple(at for at, _ in runs)
        found.append(
            Region(lengths, local_start, full, tuple(run.start for _, run in runs), tuple(len(run) for _, run in runs))
        )
    return found


def _runs(index: Index) -> Iterator[tuple[int, range]]:
    """Yields the consecutive runs of ascending indices, each with its position."""
    if isinstance(index, range):
        if len(index):
            yield 0, index
        return
    values = as_tensor(index).tolist()
    first = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[i - 1] + 1:
            yield first, range(values[first], values[i - 1] + 1)
            first = i


def _view(tensor: Tensor, shape: Shape, start: Shape, size: Shape) -> Tensor:
    view = tensor if tensor.shape == shape else tensor.view(shape)
    for dim, (first, length) in enumerate(zip(start, size)):
        if length < shape[dim]:
            view = view.narrow(dim, first, length)
    return view
