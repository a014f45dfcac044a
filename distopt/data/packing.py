"""Examples side by side in sequences of one length, and the loss on what they teach alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distopt.data.batch import IGNORED, Batch
from distopt.data.order import Order


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokens of many examples end to end, and which of them are targets: those of completions.

    starts: of each example, and the end of the last; int64, shape [examples + 1].
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


class Packed(Order):
    """Training sequences of whole examples, in the order of `Order`.

    Which examples share a sequence is decided once, by best fit (each, longest first, goes where it leaves the least
    room), and depends on their lengths alone; `packing=False` gives each a sequence of its own. An example of n tokens
    takes n - 1 places, since its last token is only a target. One that is longer is cut at its end, and left out if no
    target is left. Batches are as long as their longest sequence.

    notes: what happened to examples that are too long, and how full the sequences are, one line each.
    """

    def __init__(
        self, examples: Examples, *, sequence_length: int, batch_size: int, seed: int = 0, packing: bool = True
    ) -> None:
        self._bins = _Bins(examples, sequence_length, batch_size, packing, "train")
        super().__init__(len(self._bins), batch_size, seed)
        self.notes = self._bins.notes

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rank-th of `world` contiguous blocks of the global batch of `step`, of B / world sequences."""
        rows = self.rows(step)
        return self._bins.batch(np.split(rows, world)[rank], float(self._bins.targets[rows].mean()))


class HeldOut:
    """A fixed set of whole global batches, the same at any world size; the last one is filled up with empty sequences.

    The mean of the batches' losses over all of them and all ranks is the mean over all targets. Of more than
    `max_sequences` sequences (None: all) so many are taken, spread evenly. `len()` is the number of batches.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        sequence_length: int,
        batch_size: int,
        max_sequences: int | None = None,
        packing: bool = True,
    ) -> None:
        self._bins = _Bins(examples, sequence_length, batch_size, packing, "validation")
        self.notes = self._bins.notes
        count = min(len(self._bins), max_sequences or len(self._bins))
        chosen = np.linspace(0, len(self._bins) - 1, count).round().astype(np.int64)
        self.sequences = -(-count // batch_size) * batch_size
        self._rows = np.concatenate([chosen, np.full(self.sequences - count, -1)]).reshape(-1, batch_size)
        self._targets = float(self._bins.targets[chosen].sum() / self.sequences)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield the rank-th of `world` contiguous blocks of every batch."""
        for rows in self._rows:
            yield self._bins.batch(np.split(rows, world)[rank], self._targets)


class _Bins:
    """Which examples each sequence holds."""

    def __init__(self, examples: Examples, length: int, batch_size: int, packing: bool, split: str) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"sequence_length and batch_size must be >= 1, got {length} and {batch_size}")
        self.examples, self.packing = examples, packing
        whole = np.diff(examples.starts)
        self.lengths = np.minimum(whole - 1, length)
        taught = np.add.reduceat(examples.targets, examples.starts[:-1], dtype=np.int64)
        too_long = np.flatnonzero(whole - 1 > length)
        for i in too_long:
            taught[i] = examples.targets[examples.starts[i] : examples.starts[i] + length + 1].sum()
        kept = np.flatnonzero(taught)
        self.notes = []
        if len(too_long):
            lost = len(too_long) - np.isin(too_long, kept).sum()
            self.notes.append(
                f"{len(too_long):,} of {len(examples):,} {split} examples are longer than {length} tokens: cut"
                + (f", and {lost:,} of them, whose completion lies beyond, left out" if lost else "")
            )
        if not len(kept):
            raise ValueError(
                f"every completion of {split} lies beyond {length} tokens: give a longer train.sequence_length"
            )
        packed = best_fit(self.lengths[kept], length) if packing else np.arange(len(kept))[:, None].tolist()
        self.members = [kept[bin] for bin in packed]
        self.targets = np.array([taught[bin].sum() for bin in self.members])
        if packing:
            full = self.lengths[kept].sum() / (len(self.members) * length)
            self.notes.append(
                f"packed {len(kept):,} {split} examples into {len(self.members):,} sequences, {full:.0%} full"
            )

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, rows: np.ndarray, targets: float) -> Batch:
        """The sequences of these numbers; -1 is an empty one."""
        held = [self.members[row] if row >= 0 else [] for row in rows]
        length = max([1, *(int(self.lengths[bin].sum()) for bin in held if len(bin))])
        inputs = np.zeros((len(rows), length), dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        positions = np.zeros_like(inputs)
        for row, bin in enumerate(held):
            at = 0
            for i in bin:
                start, size = self.examples.starts[i], self.lengths[i]
                tokens = self.examples.tokens[start : start + size + 1].astype(np.int64)
                taught = self.examples.targets[start + 1 : start + size + 1].astype(bool)
                inputs[row, at : at + size] = tokens[:-1]
                labels[row, at : at + size] = np.where(taught, tokens[1:], IGNORED)
                positions[row, at : at + size] = np.arange(size)
                at += size
            positions[row, at:] = np.arange(length - at)  # what fills up is an example of its own
        where = torch.from_numpy(positions) if self.packing else None
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), where, targets)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: for each bin the numbers of its items; no length may be above the capacity."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # by the room they have left
    rooms: list[int] = []  # of these, in order
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        rest = room - size
        if rest and rest not in open_bins:
            bisect.insort(rooms, rest)
        if rest:
            open_bins.setdefault(rest, []).append(number)
    return bins
