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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from distopt.data import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
VERSION = 1  # of the cache: increment it when the same text would give different tokens or files
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
        chat: Whether there are conversations in it, so that a prompt is a message of the user.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    bytes_per_token: float
    tokenizer: str | None
    source: str
    digest: str
    chat: bool = field(default=False, kw_only=True)

    @classmethod
    def open(cls, folder: Path, tokenizer: str | None) -> Corpus:
        """Map the files of a folder that `tokenizing.write` created.

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

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of each split."""
        return {split: len(getattr(self, split)) for split in SPLITS}

    @cached_property
    def _vocabulary(self) -> tokenizers.Bytes | tokenizers.Tokenizer:
        return tokenizers.load(self.tokenizer)

    @property
    def end(self) -> int:
        """The token that ends a document; raises `ValueError` if there is none."""
        return tokenizers.end_of(self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt, without an end-of-document token."""
        return self._vocabulary.encode([prompt.encode()])[0].tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Return the text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(np.asarray(tokens).tolist())

    def pretrained_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a tokenizer of transformers that produces these tokens."""
        return self._vocabulary.pretrained()


def cache_folder(folder: str | None) -> Path:
    """Return the folder of the token cache: `folder`, else `$XDG_CACHE_HOME/distopt`, else `~/.cache/distopt`."""
    return Path(folder or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/distopt").expanduser()


def map_file(file: Path, dtype: str, count: int) -> np.ndarray:
    """Map a file of `count` integers; raise `ValueError` if it has another size."""
    size = count * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != size:
        raise ValueError(f"{file} does not have the {size} bytes that were written; delete its folder to rebuild it")
    return np.memmap(file, dtype=dtype, mode="r")


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `folder` on success.

    A killed build leaves nothing under the final name. If two processes build the same folder, one result is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
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


def remove_abandoned(cache: Path) -> None:
    """Remove the temporary folders of killed builds."""
    for building in cache.glob("*.building*"):
        with contextlib.suppress(FileNotFoundError):  # another process may finish this build at any moment
            if time.time() - max(file.stat().st_mtime for file in (building, *building.iterdir())) > _ABANDONED:
                shutil.rmtree(building, ignore_errors=True)


def in_validation(key: str, fraction: float) -> bool:
    """Return whether the document with this key belongs to validation, as a `fraction` of all documents do."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
