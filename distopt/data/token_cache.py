"""A corpus: tokens in memory-mapped files, split into train and validation, written once and opened by every rank."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from distopt.data import sources, tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation")
VERSION = 1  # of the cache: raise it when the same text would give other tokens or other files
_BATCH = 1 << 22  # bytes tokenized in one call, so that a tokenizer can use every core
_ABANDONED = 24 * 3600.0  # seconds without a write after which an unfinished build is taken for dead


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of the two splits, memory-mapped, and what is needed to read them.

    `bytes_per_token` is that of the validation text, where the end of a document counts as one byte:
    bits per byte = (nats per token) / bytes_per_token / ln 2. `tokenizer` is a folder, None for bytes.
    `digest` hashes the tokens themselves: machines that agree on it train on the same data.
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
        """Map the files of a folder that `write` made; `ValueError` if they are not as long as they were written."""
        meta = json.loads((folder / "meta.json").read_text())
        train, validation = (mapped(folder / f"{split}.bin", meta["dtype"], meta[split]["tokens"]) for split in SPLITS)
        ratio = meta["validation"]["bytes"] / meta["validation"]["tokens"]
        digest = "".join(meta[split]["digest"] for split in SPLITS)
        return cls(train, validation, meta["vocab_size"], ratio, tokenizer, meta["source"], digest)

    @cached_property
    def _vocabulary(self) -> tokenizers.Bytes | tokenizers.Tokenizer:
        return tokenizers.load(self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of `prompt`, without an end."""
        return self._vocabulary.encode([prompt.encode()])[0].tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Text of `tokens`; bytes that are no UTF-8 become U+FFFD."""
        return self._vocabulary.decode(np.asarray(tokens).tolist())

    def pretrained_tokenizer(self) -> PreTrainedTokenizerBase:
        """What transformers needs to make these tokens."""
        return self._vocabulary.pretrained()


def mapped(file: Path, dtype: str, tokens: int) -> np.ndarray:
    """The numbers of a file, as they are on the disk; `ValueError` if it does not hold so many."""
    size = tokens * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != size:
        raise ValueError(f"{file} does not hold the {size} bytes it was given; delete its folder to build it anew")
    return np.memmap(file, dtype=dtype, mode="r")


def write(folder: Path, source: sources.Source, tokenizer: str | None, validation_fraction: float) -> None:
    """Tokenize `source` into `folder`, which is there whole or not at all.

    A document goes to validation when the hash of its key falls under `validation_fraction`; where that leaves a split
    without any document (one file alone), the tail of every document does instead. Memory is bounded whatever the size
    of the source. Raises `ValueError` on text that cannot be read and on a split without any text.
    """
    with atomic_directory(folder) as aside:
        _tokenize(aside, source, tokenizer, validation_fraction)


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder`: that is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    # Built aside and renamed whole: a killed build leaves nothing under the final name, and of two builders one wins.
    aside = folder.parent / f"{folder.name}.building-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        yield aside
        os.replace(aside, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    for aside in cache.glob("*.building-*"):
        with contextlib.suppress(FileNotFoundError):  # its builder may finish at this moment
            if time.time() - max(file.stat().st_mtime for file in (aside, *aside.iterdir())) > _ABANDONED:
                shutil.rmtree(aside, ignore_errors=True)


class _Stream:
    """One split while it is written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file, self.dtype, self.digest = file, dtype, hashlib.blake2b(digest_size=16)
        self.tokens = self.bytes = 0

    def write(self, ids: np.ndarray, size: int) -> None:
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.bytes += size


def _tokenize(folder: Path, source: sources.Source, tokenizer: str | None, fraction: float) -> None:
    from tqdm import tqdm

    words = tokenizers.load(tokenizer)
    separator = np.asarray(words.separator, dtype=np.uint32)
    dtype = np.min_scalar_type(words.size - 1)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        streams = {split: _Stream(file, dtype) for split, file in files.items()}
        bar = stack.enter_context(
            tqdm(desc=f"tokenizing {source.root}", total=source.size, unit="B", unit_scale=True, delay=2)
        )
        for batch in _batches(_split(source, fraction)):
            for (split, piece), ids in zip(batch, words.encode([piece for _, piece in batch])):
                if piece:
                    streams[split].write(ids, len(piece))
                else:
                    streams[split].write(separator, len(separator))
                bar.update(len(piece))
    meta: dict[str, Any] = {
        "source": str(source),
        "tokenizer": tokenizer,
        "vocab_size": words.size,
        "dtype": dtype.name,
    }
    for split, stream in streams.items():
        if not stream.tokens:
            raise ValueError(f"validation_fraction={fraction} leaves no text for {split} in {source}; give more text")
        meta[split] = {"tokens": stream.tokens, "bytes": stream.bytes, "digest": stream.digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def in_validation(key: str, fraction: float) -> bool:
    """Whether the document of this key is held out, of which `fraction` are."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _split(source: sources.Source, fraction: float) -> Iterator[tuple[str, bytes]]:
    """Yield (split, piece) of the whole text; an empty piece ends a document."""
    sides = (in_validation(document.key, fraction) for document in source.documents())
    first = next(sides, False)
    one_sided = all(side == first for side in sides)
    for document in source.documents():
        train = 0 if in_validation(document.key, fraction) else document.size
        if one_sided:
            train = round(document.size * (1 - fraction))
        position, used = 0, set()
        for piece in document.pieces:
            cut = sources.character_start(piece, min(max(train - position, 0), len(piece)))
            position += len(piece)
            for split, part in (("train", piece[:cut]), ("validation", piece[cut:])):
                if part:
                    used.add(split)
                    yield split, part
        yield from ((split, b"") for split in sorted(used))


def _batches(pieces: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
