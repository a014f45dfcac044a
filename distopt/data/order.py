"""Text as training data: where it comes from, and the order in which its sequences are trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distopt.data import sources, token_cache, tokenizers
from distopt.data.token_cache import Corpus

__all__ = ["SUFFIXES", "Corpus", "Order", "Sequences", "TextData", "ValidationSequences"]

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Text to train on: found, split by document into train and validation, tokenized once and cached.

    Args:
        path: a file or a folder (recursive); None is the sources of Python's standard library, about 30 MB
        format: text (UTF-8, each file a document), jsonl, datasets (a folder that `Dataset.save_to_disk` wrote), or
            auto: jsonl for a .jsonl file, datasets for such a folder, text for anything else
        field: the JSONL field or the dataset column that holds the text
        suffixes: endings of the files that `text` takes from a folder; a file given as `path` may have any
        tokenizer: a Hugging Face tokenizer folder; None is bytes, 256 tokens
        validation_fraction: in (0, 1): the share of the documents, or of each document's bytes where there are too few
        cache_dir: None is `$XDG_CACHE_HOME/distopt`, or `~/.cache/distopt`; what it holds may be deleted between runs
    """

    path: str | None = None
    format: str = "auto"
    field: str = "text"
    suffixes: str | Sequence[str] = SUFFIXES
    tokenizer: str | None = None
    validation_fraction: float = 0.02
    cache_dir: str | None = None

    def check(self) -> None:
        """Raise `ValueError` on what is wrong and cheap to see: arguments, paths, the start of the first document."""
        self._open()

    def build(self) -> Corpus:
        """Open the corpus, after tokenizing it if the cache has none; `ValueError` on text that cannot be read.

        Safe on several ranks at once, but then each may do the work: let one go first.
        """
        source, tokenizer, key = self._open()
        folder = cache(self.cache_dir) / f"{source.root.stem if self.path else 'stdlib'}-{key}"
        if not folder.is_dir():
            token_cache.write(folder, source, tokenizer, self.validation_fraction)
        return Corpus.open(folder, tokenizer)

    def sequences(self, corpus: Corpus, *, sequence_length: int, batch_size: int, seed: int = 0) -> Sequences:
        """What is trained on."""
        return Sequences(corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed)

    def held_out(
        self, corpus: Corpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> ValidationSequences:
        """What is evaluated on."""
        return ValidationSequences(
            corpus.validation, sequence_length=sequence_length, batch_size=batch_size, max_sequences=max_sequences
        )

    def _open(self) -> tuple[sources.Source, str | None, str]:
        """The checked source, the tokenizer's folder, and a key that hashes all that determines the tokens."""
        if not isinstance(self.validation_fraction, float) or not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {self.validation_fraction!r}; 0.02 is usual")
        endings = [self.suffixes] if isinstance(self.suffixes, str) else self.suffixes
        if not isinstance(endings, Sequence) or not all(isinstance(ending, str) for ending in endings):
            raise ValueError(f"suffixes must be endings of names, as [.txt, .md], got {self.suffixes!r}")
        check_text("field", self.field)
        check_text("tokenizer", self.tokenizer, null=True)
        check_text("cache_dir", self.cache_dir, null=True)
        tokenizer = self.tokenizer and os.path.abspath(Path(self.tokenizer).expanduser())
        words = tokenizers.digest(tokenizer)
        source = sources.Source.open(self.path, self.format, self.suffixes, self.field)
        first = next(source.documents(), None)
        if first is None:
            raise ValueError(f"{source} holds no text; give another path")
        next(iter(first.pieces))
        key = f"{token_cache.VERSION} {source.fingerprint()} {words} {self.validation_fraction!r}"
        return source, tokenizer, hashlib.blake2b(key.encode(), digest_size=10).hexdigest()


class Order:
    """`count` sequences in an order that is a pure function of (seed, step), whatever the number of ranks.

    An epoch is a permutation drawn from (seed, epoch); step s trains on rows s B to (s + 1) B of the endless
    concatenation of epochs, so that a batch may straddle two.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}; numpy's generators take no negative one")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Indices of the sequences of the global batch of `step`, shape [B]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        return np.concatenate([self._permutation(e)[positions[epochs == e] % self.count] for e in np.unique(epochs)])

    def _permutation(self, epoch: int) -> np.ndarray:
        # Kept until another epoch is asked for: drawing it again each step would cost more than the step's data.
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self._order


class Sequences(Order):
    """Training sequences cut out of a stream of tokens, in the order of `Order`.

    Sequence i is `tokens[i L : i L + L + 1]`: L inputs and, shifted by one, L targets; the tokens after the last whole
    one are not used.
    """

    def __init__(self, tokens: np.ndarray, *, sequence_length: int, batch_size: int, seed: int = 0) -> None:
        super().__init__(_count(tokens, sequence_length, batch_size, "train"), batch_size, seed)
        self.tokens, self.sequence_length = tokens, sequence_length
        self.notes: list[str] = []

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """The rank-th of `world` contiguous blocks of the global batch of `step`: int64, shape [B / world, L + 1]."""
        return _windows(self.tokens, self.rows(step) * self.sequence_length, self.sequence_length, rank, world)


class ValidationSequences:
    """A fixed set of whole global batches, spread evenly over the validation tokens and the same at any world size.

    The set has `max_sequences` sequences (None: all), rounded down to whole batches so that every rank runs the same
    number of equal forward passes, but never less than one batch: where the tokens hold fewer, its sequences overlap.
    `len()` is the number of batches, `sequences` the number of sequences.
    """

    def __init__(
        self, tokens: np.ndarray, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> None:
        count = _count(tokens, sequence_length, batch_size, "validation")
        if max_sequences is not None and max_sequences < 1:
            raise ValueError(f"max_sequences must be >= 1 or None, got {max_sequences}; None is all")
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        self.notes: list[str] = []
        self.sequences = max(min(count, max_sequences or count) // batch_size, 1) * batch_size
        last = len(tokens) - (sequence_length + 1)
        self._starts = np.arange(self.sequences) * last // max(self.sequences - 1, 1)

    def __len__(self) -> int:
        return self.sequences // self.batch_size

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[torch.Tensor]:
        """Yield the rank-th of `world` contiguous blocks of every batch: int64, shape [B / world, L + 1]."""
        for starts in self._starts.reshape(len(self), self.batch_size):
            yield _windows(self.tokens, starts, self.sequence_length, rank, world)


def check_text(name: str, value: object, null: bool = False) -> None:
    """Raises ValueError for an option that is not text."""
    if not isinstance(value, str) and not (null and value is None):
        raise ValueError(f"data.{name} must be text{', or null' * null}, got {value!r}")


def cache(folder: str | None) -> Path:
    """Where tokens are kept: `folder`, or else `$XDG_CACHE_HOME/distopt`, or `~/.cache/distopt`."""
    return Path(folder or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/distopt").expanduser()


def _count(tokens: np.ndarray, sequence_length: int, batch_size: int, split: str) -> int:
    """Number of sequences that the tokens of `split` hold without overlap of the targets."""
    if sequence_length < 1 or batch_size < 1:
        raise ValueError(f"sequence_length and batch_size must be >= 1, got {sequence_length} and {batch_size}")
    if len(tokens) < sequence_length + 1:
        raise ValueError(
            f"{split} has {len(tokens)} tokens, one sequence needs sequence_length + 1 = {sequence_length + 1}; "
            f"give more text, a smaller sequence_length or another validation_fraction"
        )
    return (len(tokens) - 1) // sequence_length


def _windows(tokens: np.ndarray, starts: np.ndarray, sequence_length: int, rank: int, world: int) -> torch.Tensor:
    assert 0 <= rank < world and len(starts) % world == 0, (rank, world, len(starts))
    block = np.split(starts, world)[rank]
    return torch.from_numpy(tokens[block[:, None] + np.arange(sequence_length + 1)].astype(np.int64))
