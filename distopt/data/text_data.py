"""A text dataset: configuration, checks, and the cached corpus of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distopt.bounds import FIELD, SUFFIXES, VALIDATION_FRACTION
from distopt.data import hub, sources, token_cache, tokenizing
from distopt.data.documents import Documents
from distopt.data.order import Sequences
from distopt.data.separate import SeparateSequences
from distopt.data.token_cache import Corpus, cache_folder

_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")


@dataclass(frozen=True, kw_only=True)
class TextData(Documents):
    """Text to train on, split by document into train and validation, tokenized once and cached.

    Args:
        path: A file, a folder (searched recursively), or the name of a dataset on the hub; None for the sources of
            Python's standard library, about 30 MB.
        format: "text" (UTF-8, one document per file), "jsonl", "json" (a list of objects), "csv", "parquet", "datasets"
            (a folder that `Dataset.save_to_disk` wrote), or "auto": what the ending of a file says, datasets for such a
            folder, text for another folder with text files, else what the endings of its files say. "ending" is "auto"
            of a path that has to be given.
        field: The field or column that contains the text of a row.
        suffixes: File name endings that "text" reads from a folder; a file given as `path` may have any.
        files: A pattern of the paths of the files to read, within a folder, such as "*train*"; None for all.
        tokenizer: A Hugging Face tokenizer folder, or its name on the hub; None for bytes, 256 tokens.
        add_tokens: Special tokens that the tokenizer gets in addition.
        separate: Keep the documents of a sequence apart: none attends to another, and none is predicted from another.
        validation_fraction: The fraction of the documents used for validation, in (0, 1); or of the bytes of each
            document if there are too few documents.
        cache_dir: The folder of the token cache, which may be deleted between runs; None for `$XDG_CACHE_HOME/distopt`,
            or `~/.cache/distopt`.
    """

    path: str | None = None
    format: sources.Format = "auto"
    field: str = "text"
    suffixes: str | Sequence[str] = _SUFFIXES
    files: str | None = None
    validation_fraction: float = 0.02

    def check(self) -> None:
        """Check the arguments, the paths and the start of the first document, which is cheap.

        Raises:
            ValueError: One of them is invalid.
        """
        self._open()

    def build(self, processes: int = 1) -> Corpus:
        """Open the corpus, tokenizing the text first if it is not in the cache.

        If several processes of a machine call this at once, one of them tokenizes the text and the others wait.

        Args:
            processes: The number of processes that tokenize.

        Raises:
            ValueError: An argument is invalid, or the text cannot be read.
        """
        source, tokenizer, key = self._open()
        folder = cache_folder(self.cache_dir) / f"{Path(hub.origin(source.root)).stem if self.path else 'stdlib'}-{key}"
        if not folder.is_dir():
            tokenizing.write(folder, source, tokenizer, self.validation_fraction, processes)
        corpus = Corpus.open(folder, tokenizer)
        # The digest identifies the batches, since a run must not resume with others.
        return replace(corpus, digest=f"{corpus.digest} separate") if self.separate else corpus

    def sequences(
        self, corpus: Corpus, *, sequence_length: int, batch_size: int, seed: int = 0
    ) -> Sequences | SeparateSequences:
        """Return the training sequences of a corpus."""
        sequences = Sequences(corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed)
        return SeparateSequences(sequences, corpus.end) if self.separate else sequences

    def _open(self) -> tuple[sources.Source, str | None, str]:
        """Return the checked source, the tokenizer folder, and a hash of everything that determines the tokens."""
        VALIDATION_FRACTION.check("data.validation_fraction", self.validation_fraction, "0.02 is usual")
        SUFFIXES.check("data.suffixes", self.suffixes)
        FIELD.check("data.field", self.field)
        tokenizer, tokenizer_digest = self._tokenizer
        source = sources.Source.open(self.path, self.format, self.suffixes, self.field, pattern=self.files)
        first = next(source.documents(), None)
        if first is None:
            raise ValueError(f"{source} contains no text; give another path")
        next(iter(first.pieces))
        key = f"{token_cache.VERSION} {source.fingerprint()} {tokenizer_digest} {self.validation_fraction!r}"
        return source, tokenizer, hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
