"""Sequences of a stream of tokens whose documents are kept apart, as the examples of fine-tuning are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from distopt.data.batch import IGNORED, Batch
from distopt.data.batch_sizes import BatchSizes

if TYPE_CHECKING:
    from distopt.data.streamed_sequences import Bookmark


class Windows(Protocol):
    """Training sequences of tokens, such as `Sequences`."""

    sizes: BatchSizes
    notes: list[str]

    @property
    def count(self) -> int | None: ...

    @property
    def identity(self) -> dict[str, str]: ...

    def bookmarks(self, step: int) -> list[Bookmark]: ...

    def resume(self, bookmarks: Iterable[Bookmark]) -> None: ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tensor: ...


class ValidationWindows(Protocol):
    """Validation sequences of tokens, such as `ValidationSequences`."""

    sequences: int
    notes: list[str]

    def __len__(self) -> int: ...

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Tensor]: ...


class SeparateSequences:
    """Training sequences in which no document sees another: positions begin anew with each, and so does attention.

    The end of a document predicts nothing: the first token of the next one has nothing to be predicted from. The loss
    of a step is the mean over all other tokens of its whole batch. A document that is longer than a sequence, or cut by
    its end, begins anew in the next one, as without this.

    Args:
        sequences: The sequences.
        end: The token that ends a document.

    Attributes:
        count, sizes, notes, identity: As of the sequences.
    """

    def __init__(self, sequences: Windows, end: int) -> None:
        self._sequences, self._end = sequences, end
        self.count, self.notes, self.identity = sequences.count, sequences.notes, sequences.identity

    @property
    def sizes(self) -> BatchSizes:
        return self._sequences.sizes

    @sizes.setter
    def sizes(self, sizes: BatchSizes) -> None:
        self._sequences.sizes = sizes

    def bookmarks(self, step: int) -> list[Bookmark]:
        """As of the sequences."""
        return self._sequences.bookmarks(step)

    def resume(self, bookmarks: Iterable[Bookmark]) -> None:
        """As of the sequences."""
        self._sequences.resume(bookmarks)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """As `Sequences.batch`; every rank reads the whole batch, of which it needs to know the number of targets."""
        windows = self._sequences.batch(step)
        own = windows.chunk(world)[rank]
        return separated(own, self._end, _targets(windows, self._end) / len(windows))


class SeparateValidationSequences:
    """Validation sequences in which no document sees another.

    The mean of the losses over all batches and ranks is the mean over all targets.

    Args:
        sequences: The sequences.
        end: The token that ends a document.

    Attributes:
        sequences, notes: As of the sequences.
    """

    def __init__(self, sequences: ValidationWindows, end: int) -> None:
        self._windows, self._end, self.notes = sequences, end, sequences.notes
        self.sequences = sequences.sequences
        self._mean = sum(_targets(windows, end) for windows in sequences.batches()) / sequences.sequences

    def __len__(self) -> int:
        return len(self._windows)

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As `ValidationSequences.batches`."""
        for windows in self._windows.batches(rank, world):
            yield separated(windows, self._end, self._mean)


def separated(windows: Tensor, end: int, targets: float) -> Batch:
    """Return sequences of tokens as a batch that keeps their documents apart.

    Args:
        windows: Tokens, int64, shape [sequences, length + 1].
        end: The token that ends a document.
        targets: The mean number of targets per sequence of the global batch.
    """
    inputs = windows[:, :-1]
    ends = inputs == end
    places = torch.arange(inputs.shape[1]).expand_as(inputs)
    begins = torch.zeros_like(places)
    begins[:, 1:] = places[:, 1:] * ends[:, :-1]  # after an end
    return Batch(
        inputs.contiguous(), windows[:, 1:].masked_fill(ends, IGNORED), places - begins.cummax(dim=1).values, targets
    )


def _targets(windows: Tensor, end: int) -> int:
    """Return the number of targets of some sequences."""
    return int((windows[:, :-1] != end).sum())
