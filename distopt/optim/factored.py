"""Means over the rows and the columns of full matrices, of which each rank has a part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.kernels.rules import Slot
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout
from distopt.layout.dtensor import Index, as_tensor
from distopt.layout.places import boxes

# Elements at once: on the CPU temporaries stay in the cache, on a GPU those of a tile take 128 MB.
_CPU_TILE, _TILE = 2**17, 2**24

Shape = tuple[int, ...]


def is_factored(shape: Shape) -> bool:
    """Returns whether a parameter of this full shape is a matrix, or a stack of matrices."""
    return len(shape) > 1


def row_slot(shape: Shape) -> Slot | None:
    """Returns the slot of the means over the rows of the last two dimensions; None for a vector."""
    return Slot((*shape[:-1], 1), replicated=True) if is_factored(shape) else None


def column_slot(shape: Shape) -> Slot | None:
    """Returns the slot of the means over the columns of the last two dimensions; None for a vector."""
    return Slot((*shape[:-2], 1, shape[-1]), replicated=True) if is_factored(shape) else None


def unfactored_slot(shape: Shape) -> Slot | None:
    """Returns the slot of a buffer that only vectors have, laid out as they are."""
    return None if is_factored(shape) else Slot(shape)


class Tile(NamedTuple):
    """A block of a shard that is a block of its full layer too.

    Attributes:
        start: Its first element in the flattened shard, before it is cut.
        lengths: The lengths of the box that it is cut from.
        cut: The elements of the box that it has, along each dimension.
        indices: Those of the full layer.
    """

    start: int
    lengths: Shape
    cut: tuple[range, ...]
    indices: tuple[Index, ...]

    def of(self, shard: Tensor) -> Tensor:
        """Returns the tile of a local tensor, a view."""
        view = shard
        if tuple(shard.shape) != self.lengths:
            view = shard.view(-1)[self.start : self.start + math.prod(self.lengths)].view(self.lengths)
        for dim, (part, length) in enumerate(zip(self.cut, self.lengths)):
            if len(part) < length:
                view = view.narrow(dim, part.start, len(part))
        return view

    def rows(self, full: Tensor) -> Tensor:
        """Returns the values of the tile's rows, of a full tensor with one for each row."""
        return _at(full, (*self.indices[:-1], range(1)))

    def columns(self, full: Tensor) -> Tensor:
        """Returns the values of the tile's columns, of a full tensor with one for each column."""
        return _at(full, (*self.indices[:-2], range(1), self.indices[-1]))

    def add(self, squares: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Adds the sums of the tile's rows and columns to full tensors with one for each."""
        _add(rows, (*self.indices[:-1], range(1)), squares.sum(-1, keepdim=True))
        _add(columns, (*self.indices[:-2], range(1), self.indices[-1]), squares.sum(-2, keepdim=True))


class RowsAndColumns:
    """The rows and columns of all layers of a layout, in one vector, so that one all-reduce adds up all of them.

    A vector of float64 for the rows and columns of the model: 106 MB for Llama 70B, less than a thousandth of its
    gradients. Sums are rounded to float64, in an order that depends on the number of ranks; in float32 that shows
    about once in 10^8 values.

    Args:
        layout: The layout.
    """

    def __init__(self, layout: ShardLayout) -> None:
        self.layout = layout
        self._shapes = [tuple(layout.full_shape(p)) for p in layout.params]
        self._tiles: dict[int, list[Tile]] = {}
        for p, segments in layout.segments.items():
            for segment, place in zip(segments, layout.places(p)):
                shape = self._shapes[segment.layer]
                limit = _CPU_TILE if p.device.type == "cpu" else _TILE
                self._tiles[segment.layer] = [
                    tile for start, box in boxes(place, shape) for tile in _tiles(start, box.indices, limit, p.device)
                ]
        slots = [(row_slot(shape), column_slot(shape)) for shape in self._shapes]
        self._slots = [slot for pair in slots for slot in pair if slot is not None]
        self._number = {layer: i for i, layer in enumerate(i for i, pair in enumerate(slots) if pair[0] is not None)}
        elements = [count for shape in self._shapes if is_factored(shape) for count in _elements(shape)]
        self._elements = torch.cat([torch.zeros(0).double(), *elements]).to(layout.device)
        self.numel = torch.tensor([max(1, math.prod(shape)) for shape in self._shapes]).double().to(layout.device)

    def means(self, shards: Iterable[Shards]) -> dict[int, tuple[Tensor, Tensor]]:
        """Computes the means of the squared gradient over each row and each column of every matrix.

        Collective: one all-reduce for all layers, per mesh axis that shards.

        Args:
            shards: This rank's shards of the layers with a gradient.

        Returns:
            By layer, float64 tensors of the shapes of `row_slot` and `column_slot`; 0 for layers without gradient.
        """
        sums = torch.zeros_like(self._elements)
        into, counted = self._divided(sums), self.layout.counted
        for part in shards:
            for layer, grad in zip(part.layers, part.grads):
                if layer in into and (not counted or counted[layer]):
                    for tile in self._tiles[layer]:
                        tile.add(tile.of(grad).double().square(), *into[layer])
        return self._divided(self.layout.added(sums).div_(self._elements))

    def tiled(self, shards: Shards, factors: dict[int, tuple[Tensor, Tensor]]) -> Shards:
        """Returns shards cut into tiles, with the factors of each in place of the buffers: `rows` and `columns`.

        Args:
            shards: The shards.
            factors: By layer, two full tensors, as `means` returns them. For other layers, which are vectors, the
                first is `variance`, and the second is 1.
        """
        index: list[int] = []
        columns: dict[str, list[Tensor]] = {name: [] for name in ("params", "grads", "rows", "columns")}
        for i, (layer, p, g) in enumerate(zip(shards.layers, shards.params, shards.grads)):
            for tile in self._tiles[layer]:
                index.append(i)
                columns["params"].append(tile.of(p))
                columns["grads"].append(tile.of(g))
                if layer in factors:
                    columns["rows"].append(tile.rows(factors[layer][0]))
                    columns["columns"].append(tile.columns(factors[layer][1]))
                else:
                    columns["rows"].append(tile.of(shards.buffers["variance"][i]))
                    columns["columns"].append(p.new_ones(()))
        buffers = {name: columns[name] for name in ("rows", "columns")}
        return replace(shards.part(index), params=columns["params"], grads=columns["grads"], buffers=buffers)

    def _divided(self, values: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Returns views of a vector of all rows and columns, by layer."""
        parts = values.split([math.prod(slot.shape) for slot in self._slots])
        views = [part.view(slot.shape) for part, slot in zip(parts, self._slots)]
        return {layer: (views[2 * i], views[2 * i + 1]) for layer, i in self._number.items()}


def _elements(shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns the number of elements of each row, and of each column; at least 1."""
    rows, columns = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))
    of_row, of_column = (float(max(1, length)) for length in (shape[-1], shape[-2]))
    return torch.full((rows,), of_row, dtype=torch.float64), torch.full((columns,), of_column, dtype=torch.float64)


def _tiles(start: int, indices: tuple[Index, ...], limit: int, device: torch.device) -> Iterator[Tile]:
    lengths = tuple(map(len, indices))
    if not math.prod(lengths):
        return
    indices = tuple(index if isinstance(index, range) else index.to(device) for index in indices)
    for cut in _cuts(lengths, limit):
        yield Tile(start, lengths, cut, tuple(index[part.start : part.stop] for index, part in zip(indices, cut)))


def _cuts(lengths: Shape, limit: int) -> Iterator[tuple[range, ...]]:
    """Cuts a box into blocks of at most `limit` elements: full rows of dimension 0, or parts of one of them.

    So a sum over a tile is the same bits however the layer is sharded between rows of dimension 0.
    """
    if not lengths:
        yield ()
        return
    row = math.prod(lengths[1:])
    if row > limit:
        for i in range(lengths[0]):
            for rest in _cuts(lengths[1:], limit):
                yield (range(i, i + 1), *rest)
        return
    step = max(1, limit // row)
    for first in range(0, lengths[0], step):
        yield (range(first, min(first + step, lengths[0])), *map(range, lengths[1:]))


def _at(full: Tensor, indices: tuple[Index, ...]) -> Tensor:
    for dim, index in enumerate(indices):
        if isinstance(index, range):
            full = full.narrow(dim, index.start, len(index))
        else:
            full = full.index_select(dim, index)
    return full


def _add(full: Tensor, indices: tuple[Index, ...], values: Tensor) -> None:
    if all(isinstance(index, range) for index in indices):
        _at(full, indices).add_(values)
        return
    grid = torch.meshgrid(*(as_tensor(index).to(full.device) for index in indices), indexing="ij")
    full.index_put_(grid, values, accumulate=True)
