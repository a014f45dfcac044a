"""A mixture of texts: each contributes its share of the sequences of every batch, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from distopt.bounds import POSITIVE, SOURCES
from distopt.data.batch_sizes import BatchSizes
from distopt.data.order import Order, Sequences, ValidationSequences
from distopt.data.text_data import TextData
from distopt.data.token_cache import Corpus, Split

CYCLE = 4096  # sequences in which every source has its exact share
_ITS_OWN = ("path", "format", "field", "suffixes", "weight")  # what a source may set


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several texts of one tokenizer, mixed by weight.

    A source with weight w of a sum W is w / W of all sequences, and so of all tokens, however long it is: of a small
    source with a large weight the epochs come sooner. Which source is next is a pure function of seed and step.

    Args:
        sources: By name: `weight`, > 0, and `path`, `format`, `field`, `suffixes` as in `TextData`.
        tokenizer, validation_fraction, cache_dir: As in `TextData`, for all of them.
    """

    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    validation_fraction: float = 0.02
    cache_dir: str | None = None

    def check(self) -> None:
        """Check the sources, as `TextData.check` does each.

        Raises:
            ValueError: One of them is invalid, or has too small a share; with its name.
        """
        for name, text in self._texts().items():
            with _named(name):
                text.check()

    def build(self, processes: int = 1) -> MixedCorpus:
        """Open the corpora of all sources, tokenizing those that are not in the cache; as `TextData.build`."""
        corpora = {}
        for name, text in self._texts().items():
            with _named(name):
                corpora[name] = text.build(processes)
        return MixedCorpus(corpora, self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The share of each source; their sum is 1."""
        given = {name: float(source["weight"]) for name, source in self.sources.items()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def sequences(self, corpus: MixedCorpus, *, sequence_length: int, batch_size: int, seed: int = 0) -> MixedSequences:
        """Return the training sequences of a corpus."""
        sizes = dict(sequence_length=sequence_length, batch_size=batch_size, seed=seed)
        orders = {name: Sequences(tokens, **sizes) for name, tokens in corpus.of("train").items()}
        return MixedSequences(orders, corpus.weights, batch_size, seed)

    def validation_sequences(
        self, corpus: MixedCorpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> MixedValidationSequences:
        """Return the validation sequences of a corpus."""
        sizes = dict(sequence_length=sequence_length, batch_size=1)
        held = {name: ValidationSequences(tokens, **sizes) for name, tokens in corpus.of("validation").items()}
        return MixedValidationSequences(held, corpus.weights, batch_size, max_sequences)

    def _texts(self) -> dict[str, TextData]:
        SOURCES.check("data.sources", self.sources, "give data.sources={web: {path: web.jsonl, weight: 0.7}, ...}")
        common = dict(tokenizer=self.tokenizer, validation_fraction=self.validation_fraction, cache_dir=self.cache_dir)
        texts = {}
        for name, source in self.sources.items():
            with _named(name):
                if unknown := [key for key in source if key not in _ITS_OWN]:
                    raise ValueError(f"{unknown[0]!r} is no option of a source; it has {', '.join(_ITS_OWN)}")
                POSITIVE.check("weight", source.get("weight"), "the share of the sequences, such as 0.7")
                own = {key: value for key, value in source.items() if key != "weight"}
                texts[str(name)] = TextData(**common, **own)  # type: ignore[arg-type]
        counts = apportioned(list(self.weights.values()), CYCLE)
        if small := [name for name, count in zip(self.sources, counts) if not count]:
            raise ValueError(f"data.sources.{small[0]}.weight is less than 1/{CYCLE} of the sum: leave the source out")
        return texts


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Around what is of one source: its errors name that."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.sources.{source}: {error}") from error


class MixedCorpus:
    """The corpora of a mixture, by name, with what they have in common.

    Attributes:
        weights: The share of each.
        vocab_size, tokenizer, encode, decode, pretrained_tokenizer: As of each corpus.
        bytes_per_token: The mean of the corpora, by weight: bits per byte are those of the mixture.
        source: The sources with their shares, for users.
        digest: A hash of the tokens of all corpora, and of their weights.
    """

    def __init__(self, corpora: dict[str, Corpus], weights: dict[str, float]) -> None:
        self._corpora, self.weights = corpora, weights
        first = next(iter(corpora.values()))
        self.vocab_size, self.tokenizer = first.vocab_size, first.tokenizer
        self.encode, self.decode, self.pretrained_tokenizer = first.encode, first.decode, first.pretrained_tokenizer
        self.bytes_per_token = sum(weights[name] * corpus.bytes_per_token for name, corpus in corpora.items())
        self.source = "; ".join(f"{name} {weights[name]:.1%} of {corpus.source}" for name, corpus in corpora.items())
        what = [(name, corpus.digest, weights[name]) for name, corpus in corpora.items()]
        self.digest = hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of each split."""
        of_each = [corpus.sizes for corpus in self._corpora.values()]
        return {split: sum(sizes[split] for sizes in of_each) for split in of_each[0]}

    def of(self, split: Split) -> dict[str, np.ndarray]:
        """Return the tokens of a split of each source, by name."""
        return {name: getattr(corpus, split) for name, corpus in self._corpora.items()}


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
