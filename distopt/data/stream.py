"""A stream of text: rows that are read, and tokenized, while the model trains, and are never whole on a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distopt.bounds import FIELD, SHUFFLE_BUFFER, VALIDATION_DOCUMENTS
from distopt.data import tokenizers
from distopt.data.documents import Documents
from distopt.data.lane import Stream
from distopt.data.separate import SeparateSequences
from distopt.data.sources import split_text
from distopt.data.stream_files import StreamFiles
from distopt.data.stream_rows import Position, documents
from distopt.data.streamed_sequences import StreamedSequences
from distopt.data.token_cache import Corpus


@dataclass(frozen=True, eq=False)
class StreamCorpus(Corpus):
    """The tokens that are held out of a stream, and how the others are read.

    Attributes:
        train: What is trained on.
        digest: A hash of the names of the files, their sizes or their commit, of the documents held out, and of what
            else determines the batches.
    """

    train: Stream  # type: ignore[assignment]  # in place of the base class's stream of tokens

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens that are held out: how many there are to train on is not known."""
        return {"validation": len(self.validation)}


@dataclass(frozen=True, kw_only=True)
class StreamData(Documents):
    """Text of rows that is read and tokenized while the model trains: each document in turn, pass after pass.

    Args:
        path: A file of rows (JSONL, which may be compressed, or Parquet), a folder of them (searched recursively), the
            URL of either for fsspec, such as `s3://bucket/folder`, or the name of a dataset on the hub.
        field: The field or column that contains the text of a row.
        files: A pattern of the paths of the files to read, within a folder, such as "*train*"; None for all.
        validation_path: Rows to evaluate on, alike; None for the first documents of `path`, which are held out.
        validation_documents: The number of documents to evaluate on, >= 1.
        shuffle_buffer: The number of sequences, over all processes, that are shuffled among each other; 1 for the
            order of the files.
        tokenizer, add_tokens, separate: As in `TextData`.
        cache_dir: The folder of tokenizers with added tokens, as in `TextData`: of the stream nothing is kept.
    """

    path: str | None = None
    field: str = "text"
    files: str | None = None
    validation_path: str | None = None
    validation_documents: int = 512
    shuffle_buffer: int = 4096

    is_stream = True

    def check(self) -> None:
        """Check the arguments, list the files and read the first document.

        Raises:
            ValueError: One of them is invalid.
        """
        _ = self._tokenizer
        for found in dict.fromkeys(self._found):
            if next(self._documents(found), None) is None:
                raise ValueError(f"{found.origin} contains no text; give another path")

    def build(self, processes: int = 1) -> StreamCorpus:
        """Read the documents that are held out; the others are read from the first step on, whatever the processes.

        Raises:
            ValueError: An argument is invalid, or the files cannot be read.
        """
        return self._corpus

    def sequences(
        self, corpus: StreamCorpus, *, sequence_length: int, batch_size: int, seed: int = 0
    ) -> StreamedSequences | SeparateSequences:
        """Return the training sequences of a corpus."""
        sequences = StreamedSequences(corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed)
        return SeparateSequences(sequences, corpus.end) if self.separate else sequences

    @cached_property
    def _found(self) -> tuple[StreamFiles, StreamFiles]:
        """The files to train on, and those to evaluate on."""
        FIELD.check("data.field", self.field)
        VALIDATION_DOCUMENTS.check("data.validation_documents", self.validation_documents)
        SHUFFLE_BUFFER.check("data.shuffle_buffer", self.shuffle_buffer, "1 is the order of the files")
        train = StreamFiles.find(self.path, self.files)
        if self.validation_path is None:
            return train, train
        return train, StreamFiles.find(self.validation_path, key="data.validation_path")

    @cached_property
    def _corpus(self) -> StreamCorpus:
        tokenizer, digest = self._tokenizer
        vocabulary = tokenizers.load(tokenizer)
        encode = _encoder(vocabulary)
        train, validation = self._found
        texts, rows = self._held_out(validation)
        tokens = np.concatenate(encode(texts)).astype(np.min_scalar_type(vocabulary.size - 1))
        held_out = rows if self.validation_path is None else [0] * len(train.files)
        size = sum(map(len, texts)) + len(texts) * len(vocabulary.separator)
        options = self.field, self.shuffle_buffer, self.separate, held_out
        what = repr((train.version, digest, options)).encode(errors="surrogateescape")
        return StreamCorpus(
            Stream(train.files, self.field, tuple(held_out), encode, tokens.dtype, self.shuffle_buffer),
            tokens,
            vocabulary.size,
            size / len(tokens),
            tokenizer,
            f"a stream of {train.origin} ({len(train.files):,} files)",
            hashlib.blake2b(what + tokens.tobytes(), digest_size=16).hexdigest(),
        )

    def _held_out(self, found: StreamFiles) -> tuple[list[bytes], list[int]]:
        """Read the documents to evaluate on; returns them, and the number of rows of each file up to the last one."""
        texts, rows = list[bytes](), [0] * len(found.files)
        for index, row, text in self._documents(found):
            if len(texts) == self.validation_documents:
                return texts, rows
            texts.append(text)
            rows[index] = row + 1
        if self.validation_path is None:
            raise ValueError(
                f"data.validation_documents={self.validation_documents} holds out all {len(texts)} documents of "
                f"{found.origin}: give fewer, or data.validation_path"
            )
        return texts, rows

    def _documents(self, found: StreamFiles) -> Iterator[tuple[int, int, bytes]]:
        """Yield the documents in the order of the files, each with the index of its file and the number of its row."""
        for index, file in enumerate(found.files):
            for position, text in documents(file, self.field, Position(), lambda row: True):
                yield index, position.row, text


def _encoder(vocabulary: tokenizers.Bytes | tokenizers.Tokenizer) -> Callable[[Sequence[bytes]], list[np.ndarray]]:
    """Return what makes tokens of documents as the token cache has them: in pieces, and with the end of each."""
    separator = np.asarray(vocabulary.separator, dtype=np.uint32)

    def encode(texts: Sequence[bytes]) -> list[np.ndarray]:
        pieces = [list(split_text(text)) for text in texts]
        tokens = iter(vocabulary.encode([piece for each in pieces for piece in each]))
        return [np.concatenate([*(next(tokens) for _ in each), separator]) for each in pieces]

    return encode
