"""The order of training sequences as a pure function of (seed, step), and the fixed set of validation sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from distopt.bounds import SEED, integer, or_null
from distopt.data.batch_sizes import BatchSizes
from distopt.data.permutation import Permutation

if TYPE_CHECKING:
    from distopt.data.streamed_sequences import Bookmark


class Order:
    """The order in which `count` sequences are trained on: a pure function of (seed, step) at any number of ranks.

    Each epoch is a permutation drawn from (seed, epoch): NumPy's, or a keyed one without memory for more than `LARGE`
    sequences. With batches of B sequences, step s trains on entries s B to (s + 1) B of the endless concatenation of
    epochs, so that a batch may straddle two epochs.

    Args:
        count: The number of sequences.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed of the permutations, >= 0.

    Attributes:
        sizes: The number of sequences of each step, B; others may be set before the first batch.

    Raises:
        ValueError: `seed` is negative.
    """

    LARGE = 2**20

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        SEED.check("seed", seed, "numpy's generators accept no negative seed")
        self.count, self.sizes, self.seed = count, BatchSizes(batch_size), seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Return the indices of the sequences of the global batch of `step`: int64, shape [B]."""
        return self.entries(self.sizes.positions(step))

    def entries(self, positions: np.ndarray) -> np.ndarray:
        """Return the entries of the endless concatenation of epochs at some positions: int64, of the same shape."""
        epochs, found = positions // self.count, np.empty_like(positions)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            found[at] = self._permutation(epoch)[positions[at] % self.count]
        return found

    @property
    def identity(self) -> dict[str, str]:
        """What must not change when a run is resumed, beyond the seed and the data."""
        return {"order": f"keyed, above {self.LARGE} sequences"} if self.count > self.LARGE else {}

    def bookmarks(self, step: int) -> list[Bookmark]:
        """Return what a checkpoint keeps to go on at a step: nothing, as entries are a pure function of it."""
        return []

    def resume(self, bookmarks: Iterable[Bookmark]) -> None:
        """Go on from bookmarks: there are none."""

    def _permutation(self, epoch: int) -> np.ndarray | Permutation:
        if self.count > self.LARGE:
            return Permutation(self.count, self.seed, epoch)
        # Cached for the current epoch: drawing it at every step would cost more than reading the data of the step.
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self._order


class Sequences(Order):
    """Training sequences of a stream of tokens, in the order of `Order`.

    Sequence i is `tokens[i L : i L + L + 1]` for a sequence length L: L inputs and, shifted by one, L targets. The
    tokens after the last complete sequence are dropped.

    Args:
        tokens: The stream, a 1-D array of integers.
        sequence_length: The number of inputs of a sequence, L.
        batch_size: The number of sequences of a global batch, B.
        seed: The seed of the order, >= 0.

    Attributes:
        notes: Nothing to report; the counterpart of `PackedSequences.notes`.

    Raises:
        ValueError: An argument is out of bounds, or the stream is shorter than one sequence.
    """

    def __init__(self, tokens: np.ndarray, *, sequence_length: int, batch_size: int, seed: int = 0) -> None:
        super().__init__(_count(tokens, sequence_length, batch_size, "train"), batch_size, seed)
        self.tokens, self.sequence_length = tokens, sequence_length
        self.notes: list[str] = []

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Return block `rank` of the `world` contiguous blocks of the global batch of `step`.

        Returns:
            An int64 CPU tensor of shape [B / world, L + 1].
        """
        return _windows(self.tokens, self.rows(step) * self.sequence_length, self.sequence_length, rank, world)

    def sequence(self, index: int) -> torch.Tensor:
        """Return one sequence: int64, shape [L + 1]."""
        return _windows(self.tokens, np.array([index * self.sequence_length]), self.sequence_length)[0]


class ValidationSequences:
    """A fixed set of full global batches, spread evenly over the validation tokens, identical at any world size.

    The number of sequences is rounded down to full batches, so that every rank runs the same number of equal forward
    passes, but never below one batch: if there are too few tokens for one, its sequences overlap. `len()` is the number
    of batches.

    Args:
        tokens: The stream, a 1-D array of integers.
        sequence_length: The number of inputs of a sequence, L.
        batch_size: The number of sequences of a global batch, B.
        max_sequences: The maximum number of sequences; None for all.

    Attributes:
        sequences: The number of sequences.
        notes: Nothing to report; the counterpart of `PackedValidationSequences.notes`.

    Raises:
        ValueError: An argument is out of bounds, or the stream is shorter than one sequence.
    """

    def __init__(
        self, tokens: np.ndarray, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> None:
        count = _count(tokens, sequence_length, batch_size, "validation")
        or_null(integer(1)).check("max_sequences", max_sequences, "null is all")
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        self.notes: list[str] = []
        self.sequences = max(min(count, max_sequences or count) // batch_size, 1) * batch_size
        last = len(tokens) - (sequence_length + 1)
        self._starts = np.arange(self.sequences) * last // max(self.sequences - 1, 1)

    def __len__(self) -> int:
        return self.sequences // self.batch_size

    def at(self, place: float) -> torch.Tensor:
        """Return the sequence at a place of the tokens, from 0, their start, to 1: int64, shape [L + 1]."""
        last = len(self.tokens) - (self.sequence_length + 1)
        return _windows(self.tokens, np.array([round(place * last)]), self.sequence_length)[0]

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[torch.Tensor]:
        """Yield block `rank` of the `world` contiguous blocks of every batch: int64, shape [B / world, L + 1]."""
        for starts in self._starts.reshape(len(self), self.batch_size):
            yield _windows(self.tokens, starts, self.sequence_length, rank, world)


def _count(tokens: np.ndarray, sequence_length: int, batch_size: int, split: str) -> int:
    """Return the number of sequences in the tokens of `split` whose targets do not overlap."""
    integer(1).check("sequence_length", sequence_length)
    integer(1).check("batch_size", batch_size)
    if len(tokens) < sequence_length + 1:
        raise ValueError(
            f"{split} has {len(tokens)} tokens, one sequence needs sequence_length + 1 = {sequence_length + 1}; "
            f"give more text, a smaller sequence_length or another validation_fraction"
        )
    return (len(tokens) - 1) // sequence_length


def _windows(
    tokens: np.ndarray, starts: np.ndarray, sequence_length: int, rank: int = 0, world: int = 1
) -> torch.Tensor:
    assert 0 <= rank < world and len(starts) % world == 0, (rank, world, len(starts))
    block = np.split(starts, world)[rank]
    windows = np.empty((len(block), sequence_length + 1), dtype=np.int64)
    for window, start in zip(windows, block):  # slices, which need no index for each token
        window[:] = tokens[start : start + sequence_length + 1]
    return torch.from_numpy(windows)
