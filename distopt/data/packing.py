"""Packing: fine-tuning examples share sequences of a fixed length, with the loss on their completions only."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distopt.bounds import integer
from distopt.data.batch import IGNORED, Batch
from distopt.data.order import Order


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized examples, concatenated.

    Attributes:
        tokens: The tokens of all examples, a 1-D array of unsigned integers.
        targets: 1 for tokens of completions, on which the loss is computed, else 0; uint8, same shape.
        starts: The offset of each example and the end of the last one; int64, shape [examples + 1].
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


class PackedSequences(Order):
    """Training sequences of examples, in the order of `Order`.

    The packing is computed once, by best-fit decreasing (the longest example first, each into the sequence with the
    least remaining space), and depends on the lengths of the examples only. An example of n tokens takes n - 1
    positions, since its last token is only a target. Longer examples are truncated, and dropped if no target is left.
    A batch is as long as its longest sequence.

    Args:
        examples: The tokenized examples.
        sequence_length: The maximum number of inputs of a sequence.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed of the order, >= 0.
        packing: False gives every example a sequence of its own.

    Attributes:
        notes: How many examples were truncated or dropped, and how full the sequences are, one line each.

    Raises:
        ValueError: An argument is out of bounds, or every example was dropped.
    """

    def __init__(
        self, examples: Examples, *, sequence_length: int, batch_size: int, seed: int = 0, packing: bool = True
    ) -> None:
        self._bins = _Bins(examples, sequence_length, batch_size, packing, "train")
        super().__init__(len(self._bins), batch_size, seed)
        self.notes = self._bins.notes

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return block `rank` of the `world` contiguous blocks of the global batch of `step`: B / world sequences."""
        rows, bins = self.rows(step), self._bins
        means = float(bins.targets[rows].mean()), float(bins.tokens[rows].mean())
        return bins.batch(np.split(rows, world)[rank], *means)


class PackedValidationSequences:
    """A fixed set of full global batches of examples, identical at any world size; empty sequences pad the last batch.

    The mean of the losses over all batches and ranks is the mean over all targets. `len()` is the number of batches.

    Args:
        examples: The tokenized examples.
        sequence_length: The maximum number of inputs of a sequence.
        batch_size: The number of sequences of a global batch.
        max_sequences: The maximum number of sequences, selected evenly; None for all.
        packing: False gives every example a sequence of its own.

    Attributes:
        sequences: The number of sequences, padding included.
        notes: As for `PackedSequences`.

    Raises:
        ValueError: An argument is out of bounds, or every example was dropped.
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
        """Yield block `rank` of the `world` contiguous blocks of every batch."""
        for rows in self._rows:
            yield self._bins.batch(np.split(rows, world)[rank], self._targets)


class _Bins:
    """The assignment of examples to sequences.

    Attributes:
        members: The indices of the examples of each sequence.
        targets: The number of targets of each sequence, int64.
        tokens: The number of positions of each sequence that are no padding, int64.
        lengths: The number of positions that each example takes, int64.
        notes: As for `PackedSequences`.
    """

    def __init__(self, examples: Examples, length: int, batch_size: int, packing: bool, split: str) -> None:
        integer(1).check("sequence_length", length)
        integer(1).check("batch_size", batch_size)
        self.examples, self.packing = examples, packing
        full_lengths = np.diff(examples.starts)
        self.lengths = np.minimum(full_lengths - 1, length)
        targets = np.add.reduceat(examples.targets, examples.starts[:-1], dtype=np.int64)
        too_long = np.flatnonzero(full_lengths - 1 > length)
        for i in too_long:
            targets[i] = examples.targets[examples.starts[i] : examples.starts[i] + length + 1].sum()
        kept = np.flatnonzero(targets)
        self.notes: list[str] = []
        if len(too_long):
            dropped = len(too_long) - np.isin(too_long, kept).sum()
            self.notes.append(
                f"truncated {len(too_long):,} of {len(examples):,} {split} examples to {length} tokens"
                + (f", and dropped {dropped:,} of them, whose completion starts later" if dropped else "")
            )
        if not len(kept):
            raise ValueError(
                f"every completion of {split} starts beyond {length} tokens: give a longer train.sequence_length"
            )
        packed = best_fit(self.lengths[kept], length) if packing else np.arange(len(kept))[:, None].tolist()
        self.members = [kept[bin] for bin in packed]
        self.targets = np.array([targets[bin].sum() for bin in self.members])
        self.tokens = np.array([self.lengths[bin].sum() for bin in self.members])
        if packing:
            full = self.lengths[kept].sum() / (len(self.members) * length)
            self.notes.append(
                f"packed {len(kept):,} {split} examples into {len(self.members):,} sequences, {full:.0%} full"
            )

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, rows: np.ndarray, targets: float, tokens: float | None = None) -> Batch:
        """Return the sequences at the indices `rows`, where -1 is an empty sequence, as a batch with these means."""
        members = [self.members[row] if row >= 0 else [] for row in rows]
        length = max([1, *(int(self.lengths[bin].sum()) for bin in members if len(bin))])
        inputs = np.zeros((len(rows), length), dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        positions = np.zeros_like(inputs)
        for row, bin in enumerate(members):
            offset = 0
            for i in bin:
                start, size = self.examples.starts[i], self.lengths[i]
                own = self.examples.tokens[start : start + size + 1].astype(np.int64)
                is_target = self.examples.targets[start + 1 : start + size + 1].astype(bool)
                inputs[row, offset : offset + size] = own[:-1]
                labels[row, offset : offset + size] = np.where(is_target, own[1:], IGNORED)
                positions[row, offset : offset + size] = np.arange(size)
                offset += size
            positions[row, offset:] = np.arange(length - offset)  # so that padding is an example of its own
        packed_positions = torch.from_numpy(positions) if self.packing else None
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), packed_positions, targets, tokens)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing.

    Args:
        lengths: The lengths of the items, integers of at most `capacity`.
        capacity: The capacity of every bin.

    Returns:
        The indices of the items of each bin.
    """
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # the indices of bins by their remaining space
    spaces: list[int] = []  # the keys of open_bins, sorted
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        position = bisect.bisect_left(spaces, size)
        if position < len(spaces):
            space = spaces[position]
            index = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], spaces[position]
        else:
            space, index = capacity, len(bins)
            bins.append([])
        bins[index].append(i)
        remaining = space - size
        if remaining and remaining not in open_bins:
            bisect.insort(spaces, remaining)
        if remaining:
            open_bins.setdefault(remaining, []).append(index)
    return bins
