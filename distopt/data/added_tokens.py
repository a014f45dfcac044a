"""Special tokens that a tokenizer gets in addition: a folder of its own, from which everything else reads them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from distopt.bounds import TOKENS
from distopt.data import tokenizers
from distopt.data.token_cache import atomic_directory


def extended(tokenizer: str | None, tokens: Sequence[str], cache: Path) -> str | None:
    """Return the folder of a tokenizer that has additional special tokens, written into the cache unless it is there.

    Args:
        tokenizer: A Hugging Face tokenizer folder; None for bytes.
        tokens: The tokens, which get the next ids in this order; with none it is the tokenizer as it is.
        cache: The folder of the token cache.

    Raises:
        ValueError: The tokenizer has one of the tokens already, or one is given twice.
    """
    TOKENS.check("model.add_tokens", tokens)
    if not tokens:
        return tokenizer
    key = f"{tokenizers.digest(tokenizer)} {list(tokens)}".encode(errors="surrogateescape")
    folder = cache / f"tokenizer-{hashlib.blake2b(key, digest_size=10).hexdigest()}"
    if not folder.is_dir():
        _write(folder, tokenizer, tokens)
    return str(folder.absolute())


def _write(folder: Path, tokenizer: str | None, tokens: Sequence[str]) -> None:
    from transformers import AddedToken

    made = tokenizers.load(tokenizer).pretrained()
    known, name = set(made.get_vocab()), tokenizer or "of bytes"
    for token in tokens:
        if token in known:
            raise ValueError(f"model.add_tokens: {token!r} is a token of tokenizer {name} already, or given twice")
        known.add(token)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    with atomic_directory(folder) as building:
        made.save_pretrained(building)
        if tokenizer is not None and (config := Path(tokenizer) / "config.json").is_file():
            shutil.copy(config, building)  # by which transformers chooses the class of some families
