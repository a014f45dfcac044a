"""The token cache: memory-mapped files of train and validation tokens, written once and opened by every rank."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np
import torch

from distopt.data import sources, tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
VERSION = 1  # of the cache: increment it when the same text would give different tokens or files
_BATCH = 1 << 22  # bytes tokenized in one call, so that a tokenizer can use every core
_ABANDONED = 24 * 3600.0  # seconds without a write after which an unfinished build is considered dead


@dataclass(frozen=True, eq=False)
class Corpus:
    """The memory-mapped tokens of both splits, with their vocabulary.

    Attributes:
        train: The training tokens, a 1-D array of the smallest unsigned integers that contain the vocabulary.
        validation: The validation tokens, alike.
        vocab_size: The number of token ids.
        bytes_per_token: The mean size of a token of the validation text, where the end of a document counts as one
            byte: bits per byte = (nats per token) / bytes_per_token / ln 2.
        tokenizer: The tokenizer folder; None for bytes.
        source: The source of the text, for users.
        digest: A hash of the tokens: machines with equal digests train on the same data.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    bytes_per_token: float
    tokenizer: str | None
    source: str
    digest: str

    @classmethod
    def open(cls, folder: Path, tokenizer: str | None) -> Corpus:
        """Map the files of a folder that `write` created.

        Raises:
            ValueError: The size of a file differs from that recorded when it was written.
        """
        meta = json.loads((folder / "meta.json").read_text())
        train, validation = (
            map_file(folder / f"{split}.bin", meta["dtype"], meta[split]["tokens"]) for split in SPLITS
        )
        ratio = meta["validation"]["bytes"] / meta["validation"]["tokens"]
        digest = "".join(meta[split]["digest"] for split in SPLITS)
        return cls(train, validation, meta["vocab_size"], ratio, tokenizer, meta["source"], digest)

    @cached_property
    def _vocabulary(self) -> tokenizers.Bytes | tokenizers.Tokenizer:
        return tokenizers.load(self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt, without an end-of-document token."""
        return self._vocabulary.encode([prompt.encode()])[0].tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Return the text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(np.asarray(tokens).tolist())

    def pretrained_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a tokenizer of transformers that produces these tokens."""
        return self._vocabulary.pretrained()


def map_file(file: Path, dtype: str, count: int) -> np.ndarray:
    """Map a file of `count` integers; raise `ValueError` if it has another size."""
    size = count * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != size:
        raise ValueError(f"{file} does not have the {size} bytes that were written; delete its folder to rebuild it")
    return np.memmap(file, dtype=dtype, mode="r")


def write(folder: Path, source: sources.Source, tokenizer: str | None, validation_fraction: float) -> None:
    """Tokenize `source` into `folder` atomically, with bounded memory.

    A document belongs to validation if the hash of its key is below `validation_fraction`. If a split has no document
    by this rule (as with a single file), the tail of every document becomes the validation text instead.

    Args:
        folder: The folder to create.
        source: The text.
        tokenizer: A Hugging Face tokenizer folder; None for bytes.
        validation_fraction: The fraction of the documents used for validation, in (0, 1).

    Raises:
        ValueError: A file cannot be read, or a split has no text.
    """
    with atomic_directory(folder) as building:
        _tokenize(building, source, tokenizer, validation_fraction)


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `folder` on success.

    A killed build leaves nothing under the final name. If two processes build the same folder, one result is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    building = folder.parent / f"{folder.name}.building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        yield building
        os.replace(building, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove the temporary folders of killed builds."""
    for building in cache.glob("*.building-*"):
        with contextlib.suppress(FileNotFoundError):  # another process may finish this build at any moment
            if time.time() - max(file.stat().st_mtime for file in (building, *building.iterdir())) > _ABANDONED:
                shutil.rmtree(building, ignore_errors=True)


class _SplitWriter:
    """Appends tokens to the file of a split, and counts and hashes them."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file, self.dtype, self.digest = file, dtype, hashlib.blake2b(digest_size=16)
        self.tokens = self.bytes = 0

    def write(self, ids: np.ndarray, size: int) -> None:
        """Append the tokens of `size` bytes of text."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.bytes += size


def _tokenize(folder: Path, source: sources.Source, tokenizer: str | None, fraction: float) -> None:
    """Write the token files of both splits and meta.json into `folder`."""
    from tqdm import tqdm

    vocabulary = tokenizers.load(tokenizer)
    separator = np.asarray(vocabulary.separator, dtype=np.uint32)
    dtype = np.min_scalar_type(vocabulary.size - 1)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        writers = {split: _SplitWriter(file, dtype) for split, file in files.items()}
        bar = stack.enter_context(
            tqdm(desc=f"tokenizing {source.root}", total=source.size, unit="B", unit_scale=True, delay=2)
        )
        for batch in _batches(_split(source, fraction)):
            for (split, piece), ids in zip(batch, vocabulary.encode([piece for _, piece in batch])):
                if piece:
                    writers[split].write(ids, len(piece))
                else:
                    writers[split].write(separator, len(separator))
                bar.update(len(piece))
    meta: dict[str, Any] = {
        "source": str(source),
        "tokenizer": tokenizer,
        "vocab_size": vocabulary.size,
        "dtype": dtype.name,
    }
    for split, writer in writers.items():
        if not writer.tokens:
            raise ValueError(f"validation_fraction={fraction} leaves no text for {split} in {source}; give more text")
        meta[split] = {"tokens": writer.tokens, "bytes": writer.bytes, "digest": writer.digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def in_validation(key: str, fraction: float) -> bool:
    """Return whether the document with this key belongs to validation, as a `fraction` of all documents do."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _split(source: sources.Source, fraction: float) -> Iterator[tuple[Split, bytes]]:
    """Yield the text as (split, piece); an empty piece ends a document."""
    validation = (in_validation(document.key, fraction) for document in source.documents())
    first = next(validation, False)
    one_sided = all(each == first for each in validation)
    for document in source.documents():
        train = 0 if in_validation(document.key, fraction) else document.size
        if one_sided:
            train = round(document.size * (1 - fraction))
        position, used = 0, set[Split]()
        for piece in document.pieces:
            boundary = sources.character_start(piece, min(max(train - position, 0), len(piece)))
            position += len(piece)
            for split, part in zip(SPLITS, (piece[:boundary], piece[boundary:])):
                if part:
                    used.add(split)
                    yield split, part
        yield from ((split, b"") for split in sorted(used))


def _batches(pieces: Iterator[tuple[Split, bytes]]) -> Iterator[list[tuple[Split, bytes]]]:
    """Group pieces into batches of at least `_BATCH` bytes."""
    batch: list[tuple[Split, bytes]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
