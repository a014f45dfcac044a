"""What every dataset of text documents has, however it is read: a tokenizer, and documents that may be kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from distopt.bounds import switch
from distopt.data import tokenizers
from distopt.data.added_tokens import extended
from distopt.data.order import ValidationSequences
from distopt.data.separate import SeparateValidationSequences
from distopt.data.token_cache import Corpus


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The options that `TextData` and `StreamData` share.

    Args:
        tokenizer, add_tokens, separate, cache_dir: As in `TextData`.
    """

    tokenizer: str | None = None
    add_tokens: Sequence[str] = ()
    separate: bool = False
    cache_dir: str | None = None

    def validation_sequences(
        self, corpus: Corpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> ValidationSequences | SeparateValidationSequences:
        """Return the validation sequences of a corpus."""
        sequences = ValidationSequences(
            corpus.validation, sequence_length=sequence_length, batch_size=batch_size, max_sequences=max_sequences
        )
        return SeparateValidationSequences(sequences, corpus.end) if self.separate else sequences

    @cached_property
    def _tokenizer(self) -> tuple[str | None, str]:
        """The folder of the tokenizer, which has the token that `separate` needs, and its digest."""
        switch().check("data.separate", self.separate)
        folder, digest = extended(self.tokenizer, self.add_tokens, self.cache_dir)
        if self.separate:
            tokenizers.end_of(folder)
        return folder, digest
