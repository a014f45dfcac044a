"""Vocabularies: how pieces of text become tokens, and tokens text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the names of a tokenizer's files begin with.
_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "tekken")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


class Bytes:
    """UTF-8 bytes as tokens; a NUL ends a document.

    Text holds no NUL, so that a model can tell the end of a document from that of a line, as it can with a tokenizer.
    """

    size = 256
    separator: Sequence[int] = (0,)

    def encode(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of each piece."""
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens).decode(errors="replace")

    def pretrained(self) -> PreTrainedTokenizerBase:
        """The same for transformers: `encode(text)` is `list(text.encode())`; NUL is the end-of-sequence token."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # GPT-2's characters for bytes: themselves where they can be seen, the others counted from U+0100 on.
        seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        characters = [*seen, *range(0x100, 0x200 - len(seen))]
        vocabulary = dict(zip(map(chr, characters), [*seen, *sorted({*range(256)} - {*seen})]))
        # A special token is looked for in the text itself, where U+0100, GPT-2's character for NUL, is a letter.
        vocabulary["\0"] = vocabulary.pop("\u0100")
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\0", clean_up_tokenization_spaces=False)


class Tokenizer:
    """A Hugging Face tokenizer folder; its end-of-sequence token (or else its separator, if any) ends a document."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"tokenizer folder {folder} does not load ({reason}); give a save_pretrained folder"
            ) from None
        # Not len(tokenizer): a vocabulary may have holes, and every id must fit.
        self.size = max(self._tokenizer.get_vocab().values()) + 1
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self.separator: Sequence[int] = [end for end in ends if end is not None][:1]

    def encode(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of each piece, without special tokens around them; the pieces are tokenized in parallel."""
        texts = [piece.decode() for piece in pieces]
        rows = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.uint32) for row in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`."""
        return str(self._tokenizer.decode(list(tokens)))

    def pretrained(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself."""
        return self._tokenizer


def load(tokenizer: str | None) -> Bytes | Tokenizer:
    """The vocabulary of a tokenizer folder, or bytes when there is none, or it is that of a model of bytes."""
    return Bytes() if tokenizer is None or _of_bytes(tokenizer) else Tokenizer(tokenizer)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has files of a tokenizer, be it beside a model."""
    files = Path(folder).expanduser().glob("*")
    return any(file.name.startswith(_TOKENIZERS) or file.suffix == ".model" for file in files)


def _of_bytes(folder: str) -> bool:
    """Whether it is a model's folder without a tokenizer, whose vocabulary has the size of bytes."""
    config = Path(folder).expanduser() / "config.json"
    if has_tokenizer(folder) or not config.is_file():
        return False
    try:
        described = json.loads(config.read_text())
    except ValueError:
        return False
    return isinstance(described, dict) and described.get("vocab_size") == Bytes.size


def digest(tokenizer: str | None) -> str:
    """Hash the names and contents of a tokenizer folder's files but model weights; `ValueError` if there are none."""
    if tokenizer is None or _of_bytes(tokenizer):
        return "bytes"
    folder = Path(tokenizer).expanduser()
    if folder.is_dir() and not has_tokenizer(folder):
        raise ValueError(
            f"data.tokenizer: {folder} has no tokenizer: give the folder of the one that its model was trained with"
        )
    files = sorted(file for file in folder.glob("*") if file.is_file() and file.suffix not in _WEIGHTS)
    if not files:
        raise ValueError(f"tokenizer {folder} is not a folder with tokenizer files; give a save_pretrained folder")
    total = hashlib.blake2b()
    for file in files:
        total.update(file.name.encode(errors="surrogateescape") + b"\0" + hashlib.blake2b(file.read_bytes()).digest())
    return total.hexdigest()
