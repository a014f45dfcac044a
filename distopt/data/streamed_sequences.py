"""Training sequences of a stream: the same batches at any number of ranks, of which each reads its own lanes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from distopt.bounds import SEED, integer
from distopt.data.batch_sizes import BatchSizes
from distopt.data.lane import Lane, Mark, Stream

LANES = 16  # at most


class Bookmark(NamedTuple):
    """Where a lane was at a step: what a checkpoint keeps, so that a resumed run reads on from there.

    Attributes:
        source: The name of the source in a mixture, else empty.
        lane: The lane.
        block: A block of it.
        epoch, place, row, byte, skip: The mark of the block (`Mark`).
    """

    source: str
    lane: int
    block: int
    epoch: int
    place: int
    row: int
    byte: int
    skip: int


def lanes_of(sizes: BatchSizes) -> int:
    """Return the number of lanes of a stream: the largest one, up to 16, by which all batches can be divided."""
    common = math.gcd(*(size for _, size in sizes.changes))
    return max(lanes for lanes in range(1, LANES + 1) if common % lanes == 0)


class StreamedSequences:
    """Training sequences of a stream, of which nobody knows how many there are.

    The stream has a fixed number of lanes V (`lanes_of`), and of every batch each lane has an equal block of rows. Thus
    V / W lanes are read, and tokenized, on one of W <= V ranks alone; of more ranks, W / V read the same lane.

    Args:
        stream: The stream.
        sequence_length: The number of inputs of a sequence, L.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed of the order, >= 0.

    Attributes:
        count: None; the counterpart of `Sequences.count`.
        notes: How the stream is read.
    """

    count: int | None = None

    def __init__(self, stream: Stream, *, sequence_length: int, batch_size: int, seed: int = 0) -> None:
        integer(1).check("sequence_length", sequence_length)
        SEED.check("seed", seed, "numpy's generators accept no negative seed")
        self._stream, self._length, self._seed = stream, sequence_length, seed
        self.sizes = BatchSizes(batch_size)

    @property
    def sizes(self) -> BatchSizes:
        """The number of sequences of each step; set before the first batch."""
        return self._sizes

    @sizes.setter
    def sizes(self, sizes: BatchSizes) -> None:
        self._sizes, self.lanes = sizes, lanes_of(sizes)
        self._open = dict[int, Lane]()
        lanes = f"{self.lanes} lane{'s' * (self.lanes > 1)}"
        self.notes = [f"a stream of {len(self._stream.files):,} files in {lanes}, the same at any number of processes"]

    @property
    def identity(self) -> dict[str, str]:
        """What must not change when a run is resumed, beyond the seed and the data: nothing."""
        return {}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """As `Sequences.batch`."""
        share = self._sizes.size(step) // world
        places = self.places(step)[rank * share : (rank + 1) * share]
        return torch.stack([self.sequence(place) for place in places.tolist()])

    def places(self, step: int) -> np.ndarray:
        """Return the place of each sequence of the global batch of a step: int64, shape [B]."""
        each = self._sizes.size(step) // self.lanes
        numbers = self._sizes.before(step) // self.lanes + np.arange(each)
        return np.concatenate([numbers * self.lanes + lane for lane in range(self.lanes)])

    def entries(self, places: np.ndarray) -> np.ndarray:
        """Return the index of the sequence at each place, which is the place: as `Order.entries`."""
        return places

    def sequence(self, index: int) -> torch.Tensor:
        """Return one sequence, number `index // lanes` of lane `index % lanes`: int64, shape [L + 1]."""
        number, lane = divmod(index, self.lanes)
        return torch.from_numpy(self._lane(lane).sequence(number).astype(np.int64))

    def bookmarks(self, step: int) -> list[Bookmark]:
        """Return where the lanes that this rank has read are at a step."""
        return self.bookmarks_at(dict.fromkeys(range(self.lanes), self._sizes.before(step) // self.lanes))

    def bookmarks_at(self, numbers: dict[int, int], source: str = "") -> list[Bookmark]:
        """Return where the lanes that this rank has read are, each at the number of a sequence."""
        found = [(lane, *each.mark(numbers[lane])) for lane, each in sorted(self._open.items())]
        return [Bookmark(source, lane, block, *mark) for lane, block, mark in found]

    def resume(self, bookmarks: Iterable[Bookmark]) -> None:
        """Set where the lanes are, before the first batch."""
        for bookmark in bookmarks:
            self._lane(bookmark.lane).marks[bookmark.block] = Mark(*bookmark[3:])

    def _lane(self, lane: int) -> Lane:
        if lane not in self._open:
            self._open[lane] = Lane(self._stream, lane, self.lanes, self._length, self._seed)
        return self._open[lane]
