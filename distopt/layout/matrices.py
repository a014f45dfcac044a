"""The matrices of layers: which rank computes with each of them, and which ones travel together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.layout.region import Region, Shape

Held = Mapping[int, Sequence[Region]]  # by layer, the regions of it that a rank has
Cost = Callable[[int, int], float]  # of a matrix of so many rows and columns


class Matrix(NamedTuple):
    """A matrix of a layer, and the rank that computes with it.

    Attributes:
        layer: The index of the layer.
        number: Its index in a layer of three dimensions, which is a stack of matrices; else 0.
        rows: The number of its rows.
        columns: The number of its columns, of all further dimensions together.
        stacked: Whether the layer is a stack.
        owner: The rank in the group that shares the work.
    """

    layer: int
    number: int
    rows: int
    columns: int
    stacked: bool
    owner: int = 0

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def part(self, region: Region) -> Region:
        """Returns the part of a region of the layer that is in this matrix, as a region of the matrix."""
        if not self.stacked:
            return region
        if len(region.shape) == 1:
            return region.within(self.number * self.numel, self.numel)
        return region.within(self.number, 1)


def matrices(layer: int, shape: Shape) -> list[Matrix]:
    """Returns the matrices of a layer: those of a stack, or itself, with the dimensions after the first flattened."""
    if len(shape) == 3:
        return [Matrix(layer, i, shape[1], shape[2], True) for i in range(shape[0])]
    return [Matrix(layer, 0, shape[0], math.prod(shape[1:]), False)]


def with_owners(found: Sequence[Matrix], held: Sequence[Held], cost: Cost) -> list[Matrix]:
    """Chooses an owner for each matrix: the dearest first, to the rank with the least work (longest processing time).

    A matrix that some ranks have in full stays with one of these, and need not travel. The same on every rank.

    Args:
        found: The matrices.
        held: By rank, the regions of each layer.
        cost: The work for a matrix.

    Reference: Graham, Bounds on Multiprocessing Timing Anomalies, SIAM Journal on Applied Mathematics 17(2), 1969.
    """
    work = [0.0] * len(held)
    everyone = list(range(len(held)))
    able = {m: [r for r in everyone if _has_all(held[r].get(m.layer, ()), m)] or everyone for m in found}
    owned = {}
    for m in sorted(found, key=lambda m: (len(able[m]), -cost(m.rows, m.columns), m.layer, m.number)):
        owner = min(able[m], key=lambda rank: (work[rank], rank))
        work[owner] += cost(m.rows, m.columns)
        owned[m] = m._replace(owner=owner)
    return [owned[m] for m in found]


def buckets(owned: Sequence[Matrix], held: Sequence[Held], limit: int, cost: Cost) -> list[list[Matrix]]:
    """Divides layers into buckets that travel one after another: the dearest first, each into the first that it fits.

    Runs of layers would leave ranks idle where layers are sharded flat, end to end: all of a run is of a few ranks.

    Args:
        owned: The matrices with their owners, layer by layer.
        held: By rank, the regions of each layer.
        limit: The elements of a bucket that a rank sends or receives at most. A larger layer is a bucket of its own.
        cost: The work for a matrix.
    """
    layers = [list(group) for _, group in itertools.groupby(owned, key=lambda m: m.layer)]
    found: list[tuple[list[Matrix], Tensor]] = []
    for stack in sorted(layers, key=lambda stack: (-cost(stack[0].rows, stack[0].columns), stack[0].layer)):
        sizes = torch.tensor([sum(region.numel for region in rank.get(stack[0].layer, ())) for rank in held])
        copies = max(1, int(sizes.sum()) // max(1, sum(m.numel for m in stack)))
        for m in stack:
            sizes[m.owner] += m.numel * copies  # it receives one, and sends as many
        for bucket, full in found:
            if bool(((full + sizes <= limit) | (full == 0) | (sizes == 0)).all()):
                bucket += stack
                full += sizes
                break
        else:
            found.append((stack, sizes))
    return [bucket for bucket, _ in found]


def balance(owned: Sequence[Matrix], ranks: int, cost: Cost) -> float:
    """Returns the work of the busiest rank divided by the mean; 1 for no work."""
    work = [0.0] * ranks
    for m in owned:
        work[m.owner] += cost(m.rows, m.columns)
    return max(work) / (sum(work) / ranks) if sum(work) else 1.0


def _has_all(regions: Sequence[Region], m: Matrix) -> bool:
    return sum(m.part(region).numel for region in regions) == m.numel
