"""Sequences of several sources, of which each has its exact share, as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from distopt.data.batch_sizes import BatchSizes
from distopt.data.order import Order, Sequences, ValidationSequences
from distopt.data.streamed_sequences import Bookmark, StreamedSequences, lanes_of

CYCLE = 4096  # sequences in which every source has its exact share


class MixedSequences:
    """Training sequences of several sources.

    Sequence g of the run is in cycle c = g // 4096, whose order is drawn from (seed, c). In every cycle each
    source has n sequences, its weight times 4096 rounded by largest remainders, which are entries c n to (c + 1) n of
    its own `Order`: it repeats no sequence within one of its epochs.

    With a source that is streamed, all this holds of each of its lanes (`StreamedSequences`), which have equal blocks
    of rows in every batch and cycles of their own: entry k of a source in lane v of V is k V + v of the source.

    Args:
        orders: The sequences of each source, by name, whose own batches are not used.
        weights: The share of each, whose sum is 1.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed, >= 0.

    Attributes:
        count: The number of sequences of all sources; None if one is streamed.
        notes: How often the sources are seen.
    """

    def __init__(
        self,
        orders: Mapping[str, Sequences | StreamedSequences],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self._names, self.orders = list(weights), [orders[name] for name in weights]
        counts = [order.count for order in self.orders if order.count is not None]
        self.count = sum(counts) if len(counts) == len(orders) else None
        self._seed = seed
        self._counts = np.array(apportioned(list(weights.values()), CYCLE))
        self._ends = np.cumsum(self._counts)
        self.sizes = BatchSizes(batch_size)
        self.notes = [
            f"{name}: {weights[name]:.1%} of the sequences; "
            + (
                order.notes[0]
                if order.count is None
                else f"an epoch of its {order.count:,} takes {order.count / weights[name] / batch_size:,.0f} steps"
            )
            for name, order in orders.items()
        ]
        self.identity = {"mixture": repr(dict(weights))}
        for order in self.orders:
            self.identity |= order.identity

    @property
    def sizes(self) -> BatchSizes:
        """The number of sequences of each step; set before the first batch."""
        return self._sizes

    @sizes.setter
    def sizes(self, sizes: BatchSizes) -> None:
        self._sizes, self._lanes = sizes, lanes_of(sizes) if self.count is None else 1
        self._drawn = dict[int, tuple[int, np.ndarray, np.ndarray]]()
        for order in self.orders:
            order.sizes = sizes

    def members(self, step: int) -> list[tuple[int, int]]:
        """Return the source of each sequence of the global batch of `step`, and its index within the source."""
        numbers = self._sizes.before(step) // self._lanes + np.arange(self._sizes.size(step) // self._lanes)
        sources, places = np.concatenate([self._of_lane(lane, numbers) for lane in range(self._lanes)], axis=1)
        indices = np.empty_like(places)
        for source, order in enumerate(self.orders):
            indices[sources == source] = order.entries(places[sources == source])
        return list(zip(sources.tolist(), indices.tolist()))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """As `Sequences.batch`."""
        members = self.members(step)
        share = len(members) // world
        mine = members[rank * share : (rank + 1) * share]
        return torch.stack([self.orders[source].sequence(index) for source, index in mine])

    def bookmarks(self, step: int) -> list[Bookmark]:
        """Return where the lanes of streamed sources that this rank has read are at a step."""
        cycle, within = divmod(self._sizes.before(step) // self._lanes, CYCLE)
        before = [self._of_cycle(lane, cycle)[0][:within] for lane in range(self._lanes)]
        found = []
        for source, order in enumerate(self.orders):
            if isinstance(order, StreamedSequences):
                begun = cycle * int(self._counts[source])
                numbers = {lane: begun + int((drawn == source).sum()) for lane, drawn in enumerate(before)}
                found += order.bookmarks_at(numbers, self._names[source])
        return found

    def resume(self, bookmarks: Iterable[Bookmark]) -> None:
        """Set where the lanes of streamed sources are, before the first batch."""
        known = list(bookmarks)
        for name, order in zip(self._names, self.orders):
            order.resume(bookmark for bookmark in known if bookmark.source == name)

    def _of_lane(self, lane: int, numbers: np.ndarray) -> np.ndarray:
        """Return the sources and places of some sequences of a lane: int64, shape [2, len(numbers)]."""
        found = np.empty((2, len(numbers)), dtype=np.int64)
        for cycle in np.unique(numbers // CYCLE).tolist():
            at = numbers // CYCLE == cycle
            found[:, at] = np.stack(self._of_cycle(lane, cycle))[:, numbers[at] % CYCLE]
        return found

    def _of_cycle(self, lane: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sequence of a cycle of a lane, and its place in the source, in which it grows."""
        known = self._drawn.get(lane)
        if known is None or known[0] != cycle:
            # An order of its own: a checkpoint asks in another thread than the batches.
            slots = Order(CYCLE, 1, self._seed).entries((cycle * self._lanes + lane) * CYCLE + np.arange(CYCLE))
            sources = np.searchsorted(self._ends, slots, side="right")
            by_source = np.argsort(sources, kind="stable")
            nth = np.empty_like(sources)
            nth[by_source] = np.arange(CYCLE) - (self._ends - self._counts)[sources[by_source]]
            places = (cycle * self._counts[sources] + nth) * self._lanes + lane
            known = self._drawn[lane] = cycle, sources, places
        return known[1:]


class MixedValidationSequences:
    """Validation sequences of several sources, as many of each as its share, spread over all batches.

    Args:
        of_sources: The validation sequences of each source, by name.
        weights: The share of each, whose sum is 1.
        batch_size: The number of sequences of a global batch, B.
        max_sequences: The maximum number of sequences; None for as many as the scarcest source has of its share.

    Attributes:
        sequences: The number of sequences.
        notes: Nothing to report.
    """

    def __init__(
        self,
        of_sources: Mapping[str, ValidationSequences],
        weights: Mapping[str, float],
        batch_size: int,
        max_sequences: int | None = None,
    ) -> None:
        self.notes: list[str] = []
        most = min(int(of_sources[name].sequences / weight) for name, weight in weights.items())
        self.sequences = max(min(most, max_sequences or most) // batch_size, 1) * batch_size
        counts = apportioned(list(weights.values()), self.sequences)
        starts = [
            (source, float(place))
            for source, count in zip(of_sources.values(), counts)
            for place in (np.arange(count) + 0.5) / max(count, 1)
        ]
        spread = sorted(range(len(starts)), key=lambda i: starts[i][1])  # each batch has all sources
        self._starts = [starts[i] for i in spread]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self.sequences // self._batch_size

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[torch.Tensor]:
        """As `ValidationSequences.batches`."""
        share = self._batch_size // world
        for first in range(rank * share, self.sequences, self._batch_size):
            yield torch.stack([source.at(place) for source, place in self._starts[first : first + share]])


def apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Divide a number of sequences by weight: quotas are rounded down, and the largest remainders up.

    Args:
        weights: Shares, whose sum is 1.
        total: The number to divide.
    """
    quotas = [total * weight for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
