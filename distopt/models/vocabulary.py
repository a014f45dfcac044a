"""Whether the tokenizer of the data has the ids with which a model was trained, and those that it gets in addition."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.data import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_same_ids(path: Path, tokenizer: str | None) -> None:
    """Raise `ValueError` if a token of a model's own tokenizer, should it have one, has another id in a tokenizer.

    Args:
        path: The folder of the model.
        tokenizer: A Hugging Face tokenizer folder, or its name on the hub; None for bytes.
    """
    located = tokenizers.locate(tokenizer)
    if not tokenizers.has_tokenizer(path) or located == os.path.abspath(path):
        return
    own, other = (tokenizers.load(folder).pretrained().get_vocab() for folder in (str(path), located))
    if differ := [token for token, index in own.items() if other.get(token) != index]:
        given = "null (bytes)" if tokenizer is None else tokenizer
        raise ValueError(
            f"data.tokenizer={given} is not the tokenizer of the model in {path}: {len(differ)} of its {len(own)} "
            f"tokens have other ids, such as {differ[0]!r}; leave data.tokenizer out to use the model's own"
        )


def check_last_ids(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless some tokens have the last ids of a tokenizer."""
    if not tokens:
        return
    ids: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    size = max(tokenizer.get_vocab().values()) + 1
    if ids != list(range(size - len(ids), size)):
        raise ValueError(
            f"model.add_tokens={list(tokens)}: they have the ids {ids} of {size} in the tokenizer of the data, and not "
            "the last ones: give data.add_tokens=${model.add_tokens}"
        )
