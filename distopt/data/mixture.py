"""A mixture of texts: each contributes its share of the sequences of every batch, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distopt.bounds import POSITIVE, SOURCES, switch
from distopt.data import tokenizers
from distopt.data.mixed_sequences import CYCLE, MixedSequences, MixedValidationSequences, apportioned
from distopt.data.order import Sequences, ValidationSequences
from distopt.data.separate import SeparateSequences, SeparateValidationSequences
from distopt.data.stream import StreamCorpus, StreamData
from distopt.data.streamed_sequences import StreamedSequences
from distopt.data.text_data import TextData
from distopt.data.token_cache import SPLITS, Corpus

# What a source may set, beside its weight and whether it is streamed.
_PREPARED = ("path", "format", "field", "suffixes", "files")
_STREAMED = ("path", "field", "files", "validation_path", "validation_documents", "shuffle_buffer")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several texts of one tokenizer, mixed by weight.

    A source with weight w of a sum W is w / W of all sequences, and so of all tokens, however long it is: of a small
    source with a large weight the epochs come sooner. Which source is next is a pure function of seed and step.

    Args:
        sources: By name: `weight`, > 0, and `path`, `format`, `field`, `suffixes`, `files` as in `TextData`; or
            `stream`, true, and `path`, `field`, `files`, `validation_path`, `validation_documents`, `shuffle_buffer` as
            in `StreamData`.
        tokenizer, add_tokens, separate, validation_fraction, cache_dir: As in `TextData`, for all of them.
    """

    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    add_tokens: Sequence[str] = ()
    separate: bool = False
    validation_fraction: float = 0.02
    cache_dir: str | None = None

    def check(self) -> None:
        """Check the sources, as `TextData.check` does each.

        Raises:
            ValueError: One of them is invalid, or has too small a share; with its name.
        """
        for name, text in self._texts.items():
            with _named(name):
                text.check()

    def build(self, processes: int = 1) -> MixedCorpus:
        """Open the corpora of all sources, tokenizing those that are not in the cache; as `TextData.build`."""
        corpora = dict[str, Corpus]()
        for name, text in self._texts.items():
            with _named(name):
                corpora[name] = text.build(processes)
        return MixedCorpus(corpora, self.weights)

    @property
    def is_stream(self) -> bool:
        """Whether a source is streamed, so that nobody knows how many sequences there are."""
        return any(source.get("stream") is True for source in self.sources.values())

    @property
    def weights(self) -> dict[str, float]:
        """The share of each source; their sum is 1."""
        given = {name: float(source["weight"]) for name, source in self.sources.items()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def sequences(
        self, corpus: MixedCorpus, *, sequence_length: int, batch_size: int, seed: int = 0
    ) -> MixedSequences | SeparateSequences:
        """Return the training sequences of a corpus."""
        sizes = dict(sequence_length=sequence_length, batch_size=batch_size, seed=seed)
        orders = {
            name: StreamedSequences(each.train, **sizes)
            if isinstance(each, StreamCorpus)
            else Sequences(each.train, **sizes)
            for name, each in corpus.corpora.items()
        }
        mixed = MixedSequences(orders, corpus.weights, batch_size, seed)
        return SeparateSequences(mixed, corpus.end) if self.separate else mixed

    def validation_sequences(
        self, corpus: MixedCorpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> MixedValidationSequences | SeparateValidationSequences:
        """Return the validation sequences of a corpus."""
        sizes = dict(sequence_length=sequence_length, batch_size=1)
        held = {name: ValidationSequences(each.validation, **sizes) for name, each in corpus.corpora.items()}
        mixed = MixedValidationSequences(held, corpus.weights, batch_size, max_sequences)
        return SeparateValidationSequences(mixed, corpus.end) if self.separate else mixed

    @cached_property
    def _texts(self) -> dict[str, TextData | StreamData]:
        SOURCES.check("data.sources", self.sources, "give data.sources={web: {path: web.jsonl, weight: 0.7}, ...}")
        texts = {}
        for name, source in self.sources.items():
            with _named(name):
                texts[str(name)] = self._text(source)
        counts = apportioned(list(self.weights.values()), CYCLE)
        if small := [name for name, count in zip(self.sources, counts) if not count]:
            raise ValueError(f"data.sources.{small[0]}.weight is less than 1/{CYCLE} of the sum: leave the source out")
        return texts

    def _text(self, source: Mapping[str, Any]) -> TextData | StreamData:
        common = {name: getattr(self, name) for name in ("tokenizer", "add_tokens", "separate", "cache_dir")}
        own = {key: value for key, value in source.items() if key not in ("weight", "stream")}
        streamed = source.get("stream", False)
        switch().check("stream", streamed)
        known = _STREAMED if streamed else _PREPARED
        if unknown := [key for key in own if key not in known]:
            what = "a source that is streamed" if streamed else "a source"
            raise ValueError(f"{unknown[0]!r} is no option of {what}; it has {', '.join((*known, 'weight', 'stream'))}")
        POSITIVE.check("weight", source.get("weight"), "the share of the sequences, such as 0.7")
        if streamed:
            return StreamData(**common, **own)
        return TextData(validation_fraction=self.validation_fraction, **common, **own)


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
        corpora: The corpora.
        weights: The share of each.
        vocab_size, tokenizer, chat, encode, decode, pretrained_tokenizer: As of each corpus.
        bytes_per_token: The mean of the corpora, by weight: bits per byte are those of the mixture.
        source: The sources with their shares, for users.
        digest: A hash of the tokens of all corpora, and of their weights.
    """

    def __init__(self, corpora: dict[str, Corpus], weights: dict[str, float]) -> None:
        self.corpora, self.weights = corpora, weights
        first = next(iter(corpora.values()))
        self.vocab_size, self.tokenizer, self.chat = first.vocab_size, first.tokenizer, first.chat
        self.encode, self.decode, self.pretrained_tokenizer = first.encode, first.decode, first.pretrained_tokenizer
        self.bytes_per_token = sum(weights[name] * corpus.bytes_per_token for name, corpus in corpora.items())
        self.source = "; ".join(f"{name} {weights[name]:.1%} of {corpus.source}" for name, corpus in corpora.items())
        what = [(name, corpus.digest, weights[name]) for name, corpus in corpora.items()]
        self.digest = hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()

    @property
    def end(self) -> int:
        """The token that ends a document; raises `ValueError` if there is none."""
        return tokenizers.end_of(self.tokenizer)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of each split; of those to train on it is not known if a source is streamed."""
        of_each = [corpus.sizes for corpus in self.corpora.values()]
        known = [split for split in SPLITS if all(split in sizes for sizes in of_each)]
        return {split: sum(sizes[split] for sizes in of_each) for split in known}
