"""A lane of a stream: sequences of its part of the documents, in shuffled blocks, each found again from a mark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distopt.data.stream_files import StreamFile
from distopt.data.stream_rows import Position, documents

_BATCH = 1 << 18  # bytes of text that are tokenized in one call, of one pass over the files


@dataclass(frozen=True)
class Stream:
    """The documents of a stream, and what makes tokens of them.

    Attributes:
        files: The files, sorted by path.
        field: The field or column with the text.
        held_out: By file, the number of rows at its start that are not trained on.
        encode: Returns the tokens of each of some documents, with the token that ends it.
        dtype: The type of a token.
        buffer: The number of sequences of a block, over all lanes; 1 for the order of the files.
    """

    files: tuple[StreamFile, ...]
    field: str
    held_out: tuple[int, ...]
    encode: Callable[[Sequence[bytes]], list[np.ndarray]]
    dtype: np.dtype
    buffer: int


class Mark(NamedTuple):
    """A place in the tokens of a lane.

    Attributes:
        epoch: The pass over the files.
        place: The index of the file among those of the lane in that pass.
        row, byte: The position of the document (`Position`).
        skip: The number of tokens of the document before the place.
    """

    epoch: int = 0
    place: int = 0
    row: int = 0
    byte: int = 0
    skip: int = 0


class Turn(NamedTuple):
    """A file of a lane, by its index, of whose rows it takes every `turns`-th, from number `turn` on."""

    file: int
    turn: int
    turns: int


class Lane:
    """The endless sequences of one of several equal parts of a stream, read forwards with bounded memory.

    In each pass the files are shuffled and dealt out to the lanes, equally many whole files to each; the files that are
    left over are read by all lanes, of which each takes its turn of the rows. The tokens of its documents follow each
    other, pass after pass, and are cut into sequences, of which N = buffer / lanes make a block. Block b is in an order
    that is drawn from (seed, lane, b). While one block is used, the next is read, sequence by sequence.

    Sequence n is a pure function of the stream, the seed and n. To return to a block it is read again from its mark.

    Args:
        stream: The stream.
        lane, lanes: Which part of how many.
        length: The number of inputs of a sequence, L.
        seed: The seed of the order, >= 0.

    Attributes:
        marks: Where blocks begin, by block: the first, and the newest `_KEPT`.
    """

    _KEPT = 64

    def __init__(self, stream: Stream, lane: int, lanes: int, length: int, seed: int) -> None:
        self._stream, self._lane, self._lanes, self._length, self._seed = stream, lane, lanes, length, seed
        self._size = max(stream.buffer // lanes, 1)
        self.marks = {0: Mark()}
        self._block = -1

    def sequence(self, number: int) -> np.ndarray:
        """Return a sequence: L + 1 tokens."""
        block, place = divmod(number, self._size)
        if block != self._block:
            self._go_to(block)
        self._read((self._size + place + 1) * self._length + 1)
        start = int(self._order[place]) * self._length
        return self._tokens[start : start + self._length + 1]

    def mark(self, number: int) -> tuple[int, Mark]:
        """Return the nearest block whose mark is known, at or before that of a sequence, and its mark."""
        block = max(known for known in list(self.marks) if known <= number // self._size)
        return block, self.marks[block]

    def _go_to(self, block: int) -> None:
        start, mark = self.mark(block * self._size)
        if start != self._block:
            self._block, self._documents = start, self._read_documents(mark)
            self._tokens, self._starts = np.empty(0, self._stream.dtype), list[tuple[int, Mark]]()
        while self._block < block:
            self._advance()
        shuffled = np.random.default_rng([self._seed, self._lane, block]).permutation(self._size)
        self._order = shuffled if self._stream.buffer > 1 else np.arange(self._size)

    def _advance(self) -> None:
        """Drop the tokens of a block, of which the last is the first of the next one."""
        cut = self._size * self._length
        self._read(cut + 1)
        begun = max(i for i, (start, _) in enumerate(self._starts) if start <= cut)
        self._starts = [(start - cut, mark) for start, mark in self._starts[begun:]]
        start, mark = self._starts[0]
        self._tokens, self._block = self._tokens[cut:].copy(), self._block + 1
        self.marks[self._block] = mark._replace(skip=mark.skip - start)
        for old in sorted(self.marks)[1 : -self._KEPT]:
            del self.marks[old]

    def _read(self, count: int) -> None:
        """Read until there are so many tokens from the start of the block on."""
        while len(self._tokens) < count:
            marks, texts, size = list[Mark](), list[bytes](), 0
            while size < _BATCH and (not marks or marks[-1].epoch == marks[0].epoch):
                mark, text = next(self._documents)
                marks.append(mark)
                texts.append(text)
                size += len(text)
            parts, total = [self._tokens], len(self._tokens)
            for mark, tokens in zip(marks, self._stream.encode(texts)):
                self._starts.append((total, mark))
                parts.append(tokens[mark.skip :].astype(self._stream.dtype))
                total += len(parts[-1])
            self._tokens = np.concatenate(parts)

    def _read_documents(self, start: Mark) -> Iterator[tuple[Mark, bytes]]:
        """Yield the documents of this lane from a mark on, pass after pass, each with its mark."""
        stream, found = self._stream, False
        for epoch in itertools.count(start.epoch):
            for place, (file, turn, turns) in enumerate(self._turns(epoch)):
                if (epoch, place) < (start.epoch, start.place):
                    continue
                first, held_out = (epoch, place) == (start.epoch, start.place), stream.held_out[file]
                position = Position(start.row, start.byte) if first else Position()

                def is_own(row: int, held_out: int = held_out, turn: int = turn, turns: int = turns) -> bool:
                    return row >= held_out and (row - held_out) % turns == turn

                for (row, byte), text in documents(stream.files[file], stream.field, position, is_own):
                    found = True
                    mark = Mark(epoch, place, row, byte)
                    yield mark._replace(skip=start.skip) if mark[:4] == start[:4] else mark, text
            if not found and epoch > start.epoch:
                raise ValueError(
                    f"{stream.files[0]} and the other files of the stream have too few rows to be dealt out to "
                    f"{self._lanes} lanes: prepare them, by data=text"
                )

    def _turns(self, epoch: int) -> list[Turn]:
        """The files of a pass in the order in which this lane reads them."""
        count, lanes = len(self._stream.files), self._lanes
        order = np.arange(count)
        if self._stream.buffer > 1:
            order = np.random.default_rng([self._seed, epoch]).permutation(count)
        whole = count - count % lanes
        own = [Turn(index, 0, 1) for index in order[:whole].tolist()[self._lane :: lanes]]
        return own + [Turn(index, self._lane, lanes) for index in order[whole:].tolist()]
