"""A hash of the content of a parameter that does not depend on its sharding: the hashes of the shards add up.

    h = sum over elements (i, j) of r(i) * c(j) * bits(i, j)  mod 2^64

The parameter is taken as a matrix, where i is the index of its first dimension, and j that of all others flattened; a
vector is one row. bits(i, j) is the element as an integer. The weights r and c are odd, so that a change of a single
element is always detected; other changes go undetected with a probability of about 2^-32. The hash is no defence
against an adversary.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.layout.dtensor import Index
from distopt.layout.places import Box, Place, size

_ROWS, _COLUMNS = 0, 1  # which weights
_BLOCK = 2**16  # weights per block: a table has those of the first block, and a factor for each further one
_MASK = (1 << 64) - 1
# Elements hashed at once, as int64: on the CPU as many as fit in the cache, elsewhere 64 MB of scratch memory.
_CPU_TILE, _TILE = 2**16, 2**22


def content(part: Tensor, shape: Sequence[int], place: Place) -> Tensor:
    """Returns the hash of a shard of a parameter.

    Args:
        part: The local tensor, of any real dtype.
        shape: The full shape of the parameter.
        place: The elements of the parameter that the local tensor has, in its order.

    Returns:
        A 0-D int64 tensor on the device of the shard. Hashes of shards add up modulo 2^64.

    Raises:
        ValueError: If the number of elements of the tensor is not that of its place.
    """
    if part.numel() != size(place):
        raise ValueError(f"a local tensor has {part.numel()} elements where its layout says {size(place)}")
    if not part.numel():
        return torch.zeros((), dtype=torch.int64, device=part.device)
    flat = _bits(part).reshape(-1)
    sums: list[Tensor] = []
    for start, rectangle in _rectangles(place, shape):
        count = len(rectangle.rows) * rectangle.width
        sums += _hashes(flat[start : start + count].view(-1, rectangle.width), rectangle)
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def cover(shape: Sequence[int], place: Place) -> int:
    """Returns the hash of ones at a place of a parameter, which identifies the place. Costs rows + columns."""
    if not size(place):
        return 0
    total = 0
    for _, rectangle in _rectangles(place, shape):
        if isinstance(rectangle.columns, range):
            columns = _sum(rectangle.columns, _COLUMNS)
        else:
            columns = sum(int(rectangle.weights(start, stop, _CPU).sum()) for start, stop in _tiles(rectangle.width))
        total += _sum(rectangle.rows, _ROWS) * columns
    return signed(total)


def signed(number: int) -> int:
    """Returns a number modulo 2^64 as a signed 64-bit integer."""
    return (number + 2**63) % 2**64 - 2**63


def number_of(thing: object) -> int:
    """Returns a hash of the repr of any object, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(thing).encode(), digest_size=8).digest(), "little", signed=True)


def balanced(index: int, count: int) -> int:
    """Returns one of `count` factors: multiplied by them, equal numbers add up to 0, and unequal ones do not."""
    if index:
        return number_of(("balanced", index)) | 1
    return signed(-sum(balanced(i, count) for i in range(1, count)))


class _Rectangle(NamedTuple):
    """Rows and columns of the matrix; columns that are not consecutive are given as indices of dimensions 1, 2, ..."""

    rows: Index
    columns: range | tuple[Index, ...]
    shape: Sequence[int] = ()  # of the parameter from dimension 1 on, for such columns

    @property
    def width(self) -> int:
        return len(self.columns) if isinstance(self.columns, range) else math.prod(map(len, self.columns))

    def weights(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Returns the weights of the columns with indices from `start` to `stop`, exclusive."""
        if isinstance(self.columns, range):
            return _weights(self.columns[start:stop], _COLUMNS, device)
        local = torch.arange(start, stop, device=device)
        places, stride = torch.zeros_like(local), 1
        for indices, full in zip(reversed(self.columns), reversed(self.shape)):
            at = local % len(indices)
            places += stride * (at + indices.start if isinstance(indices, range) else indices.to(device)[at])
            local, stride = local // len(indices), stride * full
        return _weights(places, _COLUMNS, device)


def _rectangles(place: Place, shape: Sequence[int]) -> Iterator[tuple[int, _Rectangle]]:
    """Yields a place as rectangles, each with the index of its first element in the flattened local tensor."""
    if isinstance(place, Box):
        if len(shape) > 1:
            yield 0, _box(place.indices, shape)
        else:  # a vector is a row
            columns = place.indices[0] if shape else range(1)
            yield 0, _Rectangle(range(1), columns if isinstance(columns, range) else (columns,), shape)
        return
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    done = 0
    while done < place.length:
        row, column = divmod(place.start + done, width)
        count = min(place.length - done, width - column)
        rows = 1 if column or count < width else (place.length - done) // width
        yield done, _Rectangle(range(row, row + rows), range(column, column + count))
        done += rows * count


def _box(indices: tuple[Index, ...], shape: Sequence[int]) -> _Rectangle:
    rows, second, *others = indices
    inner = math.prod(shape[2:])
    if isinstance(second, range) and all(len(index) == full for index, full in zip(others, shape[2:])):
        return _Rectangle(rows, range(second.start * inner, second.stop * inner))
    return _Rectangle(rows, (second, *others), shape[1:])


def _hashes(matrix: Tensor, place: _Rectangle) -> Iterator[Tensor]:
    """Yields the hashes of the tiles of a matrix of bits."""
    cpu = matrix.device.type == "cpu"
    tile = _CPU_TILE if cpu else _TILE
    for left, right in _tiles(place.width, tile):
        columns = place.weights(left, right, matrix.device)
        for top, bottom in _tiles(len(matrix), max(1, tile // (right - left))):
            rows = _weights(place.rows[top:bottom], _ROWS, matrix.device)
            part = matrix[top:bottom, left:right]
            # torch 2.13 has integer matrix products on the CPU only, where they are faster than elementwise ones.
            products = part.long().mv(columns) if cpu else (part * columns).sum(1)
            yield (products * rows).sum()


def _tiles(length: int, tile: int = _CPU_TILE) -> Iterator[tuple[int, int]]:
    return ((start, min(start + tile, length)) for start in range(0, length, tile))


def _bits(part: Tensor) -> Tensor:
    """Returns each element as an integer."""
    if part.dtype.is_floating_point:
        part = part.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()])
    if part.dtype in (torch.int64, torch.uint64):
        # The highest bit is repeated at a lower place: at its own all weights agree, and two signs would cancel.
        part = part.to(torch.int64)
        part = part ^ (part >> 32 & 0xFFFFFFFF)
    return part.to(torch.uint8) if part.dtype == torch.bool else part


def _weights(index: Index, axis: int, device: torch.device) -> Tensor:
    """Returns the odd weights of these rows or columns."""
    low, high = _tables(device)[axis]
    if isinstance(index, range):
        block = index.start // _BLOCK
        if (index.stop - 1) // _BLOCK == block:
            some = low[index.start - block * _BLOCK : index.stop - block * _BLOCK]
            return some * high[block] if block else some
        index = torch.arange(index.start, index.stop, device=device)
    index = index.to(device)
    return low[index % _BLOCK] * high[index // _BLOCK]


def _sum(index: Index, axis: int) -> int:
    """Returns the sum of the weights of these rows or columns, modulo 2^64."""
    if not isinstance(index, range):
        return int(_weights(index, axis, _CPU).sum())
    low, high = _tables(_CPU)[axis]
    first, last = -(-index.start // _BLOCK), index.stop // _BLOCK  # the blocks that it contains entirely
    if first >= last:
        return int(_weights(index, axis, _CPU).sum())
    ends = (range(index.start, first * _BLOCK), range(last * _BLOCK, index.stop))
    inner = int(low.sum()) * int(high[first:last].sum())
    return inner + sum(int(_weights(end, axis, _CPU).sum()) for end in ends if end)


_CPU = torch.device("cpu")


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns, for rows and for columns, the weights of the first block and a factor for each block. 2 MB."""
    low_rows, high_rows, low_columns, high_columns = (_odd(salt) for salt in range(4))
    for high in (high_rows, high_columns):
        high[0] = 1
    tables = [t.to(device) for t in (low_rows, high_rows, low_columns, high_columns)]
    return (tables[0], tables[1]), (tables[2], tables[3])


def _odd(salt: int) -> Tensor:
    """Returns pseudo-random odd 64-bit numbers, the same on every machine."""
    x = torch.arange(_BLOCK) + salt * 0x1E3779B97F4A7C15
    for shift, factor in ((32, 0x4F1BBCDCBFA53E0B), (29, 0x2545F4914F6CDD1D), (32, 0x1B873593CC9E2D51)):
        x = (x ^ (x >> shift & (_MASK >> shift))) * factor
    return x | 1
