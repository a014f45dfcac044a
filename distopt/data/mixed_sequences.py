"""Sequences of several sources, of which each has its exact share, as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from distopt.data.batch_sizes import BatchSizes
from distopt.data.order import Order, Sequences, ValidationSequences

CYCLE = 4096  # sequences in which every source has its exact share


class MixedSequences:
    """Training sequences of several sources.

    Sequence g of the run is in cycle c = g // 4096, whose order is drawn from (seed, c). In every cycle each
    source has n sequences, its weight times 4096 rounded by largest remainders, which are entries c n to (c + 1) n of
    its own `Order`: it repeats no sequence within one of its epochs.

    Args:
        orders: The sequences of each source, by name, whose own batches are not used.
        weights: The share of each, whose sum is 1.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed, >= 0.

    Attributes:
        count: The number of sequences of all sources.
        sizes: As of `Order`.
        notes: How often the sources are seen.
    """

    def __init__(
        self, orders: Mapping[str, Sequences], weights: Mapping[str, float], batch_size: int, seed: int = 0
    ) -> None:
        self.orders = [orders[name] for name in weights]
        self.sizes, self.count = BatchSizes(batch_size), sum(order.count for order in self.orders)
        self._cycle = Order(CYCLE, batch_size, seed)
        self._counts = np.array(apportioned(list(weights.values()), CYCLE))
        self._ends = np.cumsum(self._counts)
        self.notes = [
            f"{name}: {weights[name]:.1%} of the sequences; an epoch of its {order.count:,} takes "
            f"{order.count / weights[name] / batch_size:,.0f} steps"
            for name, order in orders.items()
        ]
        self.identity = {"mixture": repr(dict(weights))}
        for order in self.orders:
            self.identity |= order.identity

    def members(self, step: int) -> list[tuple[int, int]]:
        """Return the source of each sequence of the global batch of `step`, and its index within the source."""
        positions = self.sizes.positions(step)
        slots = self._cycle.entries(positions)
        sources = np.searchsorted(self._ends, slots, side="right")
        within = slots - (self._ends - self._counts)[sources]
        places = positions // CYCLE * self._counts[sources] + within
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
