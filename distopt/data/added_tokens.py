"""Special tokens that a tokenizer gets in addition: a folder of its own, from which everything else reads them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from distopt.bounds import PATH, TOKENS, or_null
from distopt.data import tokenizers
from distopt.data.token_cache import atomic_directory, cache_folder


def extended(tokenizer: str | None, tokens: Sequence[str], cache_dir: str | None) -> tuple[str | None, str]:
    """Return the folder of a tokenizer that has additional special tokens, and its digest.

    Args:
        tokenizer: A Hugging Face tokenizer folder, or its name on the hub; None for bytes.
        tokens: The tokens, which get the next ids in this order; with none it is the tokenizer as it is.
        cache_dir: The folder of the token cache, where the folder is written unless it is there; None for the default.

    Raises:
        ValueError: There is no such tokenizer, it has one of the tokens already, or one is given twice.
    """
    or_null(PATH).check("data.tokenizer", tokenizer)
    or_null(PATH).check("data.cache_dir", cache_dir)
    TOKENS.check("model.add_tokens", tokens)
    located = tokenizers.locate(tokenizer)
    digest = tokenizers.digest(located)
    if not tokens:
        return located, digest
    key = f"{digest} {list(tokens)}".encode(errors="surrogateescape")
    folder = cache_folder(cache_dir) / f"tokenizer-{hashlib.blake2b(key, digest_size=10).hexdigest()}"
    if not folder.is_dir():
        _write(folder, located, tokens)
    return str(folder.absolute()), tokenizers.digest(str(folder))


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
