"""Tokenizers: Hugging Face tokenizer folders, and UTF-8 bytes as a vocabulary of 256 tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distopt.data import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prefixes of the names of tokenizer files, and suffixes of weight files.
_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "tekken")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


class Bytes:
    """A vocabulary of the 256 byte values, where a NUL ends a document.

    Text does not contain NUL, so that a model can distinguish the end of a document from that of a line, as with a
    tokenizer.
    """

    size = 256
    separator: Sequence[int] = (0,)

    def encode(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each piece, uint8."""
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return bytes(tokens).decode(errors="replace")

    def pretrained(self) -> PreTrainedTokenizerBase:
        """Return the equivalent tokenizer of transformers.

        Its `encode(text)` is `list(text.encode())`, and NUL is the end-of-sequence token.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # GPT-2's alphabet of bytes: visible characters stand for themselves, the others are numbered from U+0100.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        characters = [*visible, *range(0x100, 0x200 - len(visible))]
        vocabulary = dict(zip(map(chr, characters), [*visible, *sorted({*range(256)} - {*visible})]))
        # Special tokens are matched in the text itself, where U+0100, GPT-2's character for NUL, is a letter.
        vocabulary["\0"] = vocabulary.pop("\u0100")
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\0", clean_up_tokenization_spaces=False)


class Tokenizer:
    """A Hugging Face tokenizer, whose end-of-sequence token, else its separator token if any, ends a document.

    Args:
        folder: A folder written by `save_pretrained`.

    Attributes:
        size: The vocabulary size: the highest token id plus one.
        separator: The token that ends a document, or none.

    Raises:
        ValueError: The folder cannot be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            # Not len(tokenizer): ids may have gaps, and the largest id must be below the size.
            self.size = max(self._tokenizer.get_vocab().values()) + 1
        except Exception as error:  # of any class, by what the files happen to say
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(
                f"tokenizer folder {folder} does not load ({reason}); give a save_pretrained folder"
            ) from None
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self.separator: Sequence[int] = [end for end in ends if end is not None][:1]

    def encode(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each piece, uint32, without added special tokens; tokenizes the pieces in parallel."""
        texts = [piece.decode() for piece in pieces]
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:  # without the offsets, which take a third of the time
            backend.no_truncation()
            backend.no_padding()
            rows = (row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False))
            return [np.asarray(row, dtype=np.uint32) for row in rows]
        rows = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.uint32) for row in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens."""
        return str(self._tokenizer.decode(list(tokens)))

    def pretrained(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of transformers."""
        return self._tokenizer


def locate(tokenizer: str | None, key: str = "data.tokenizer") -> str | None:
    """Return the full path of a tokenizer folder, downloaded if it is a name on the hub; None for None.

    Raises:
        ValueError: The name is not on the hub, or cannot be downloaded.
    """
    return None if tokenizer is None else os.path.abspath(hub.folder(key, tokenizer, hub.TOKENIZER))


def load(tokenizer: str | None) -> Bytes | Tokenizer:
    """Load the tokenizer of a folder; bytes for None and for the folder of a byte-level model."""
    return Bytes() if tokenizer is None or _is_byte_model(tokenizer) else Tokenizer(tokenizer)


def end_of(tokenizer: str | None) -> int:
    """Return the token that ends a document.

    Raises:
        ValueError: The tokenizer has none.
    """
    separator = load(tokenizer).separator
    if not len(separator):
        raise ValueError(
            f"data.separate=true: tokenizer {tokenizer} has no token that ends a text, by which documents are told "
            "apart: set its eos_token and save it"
        )
    return int(separator[0])


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder contains tokenizer files."""
    files = Path(folder).expanduser().glob("*")
    return any(file.name.startswith(_TOKENIZERS) or file.suffix == ".model" for file in files)


def _is_byte_model(folder: str) -> bool:
    """Return whether a folder contains a model with a vocabulary of 256 tokens, and no tokenizer."""
    config = Path(folder).expanduser() / "config.json"
    if has_tokenizer(folder) or not config.is_file():
        return False
    try:
        fields = json.loads(config.read_text())
    except ValueError:
        return False
    return isinstance(fields, dict) and fields.get("vocab_size") == Bytes.size


def digest(tokenizer: str | None) -> str:
    """Hash the names and contents of all files of a tokenizer folder except model weights; "bytes" for None.

    Raises:
        ValueError: The folder contains no tokenizer.
    """
    if tokenizer is None or _is_byte_model(tokenizer):
        return "bytes"
    folder = Path(tokenizer).expanduser()
    if folder.is_dir() and not has_tokenizer(folder):
        raise ValueError(
            f"data.tokenizer: {folder} has no tokenizer: give the folder of the tokenizer that its model was trained "
            "with"
        )
    files = sorted(file for file in folder.glob("*") if file.is_file() and file.suffix not in _WEIGHTS)
    if not files:
        raise ValueError(f"tokenizer {folder} is not a folder with tokenizer files; give a save_pretrained folder")
    total = hashlib.blake2b()
    for file in files:
        total.update(file.name.encode(errors="surrogateescape") + b"\0" + hashlib.blake2b(file.read_bytes()).digest())
    return total.hexdigest()
