"""Configurations of transformers models, built from a family and options, or from a pretrained folder."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTIONS = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}  # by the names of transformers
# Options that determine how weights are divided among heads, which does not show in their shapes.
_HEADS = re.compile(r"(n|num)_(\w+_)?heads?|(\w+_)?head_dim")


def attention_options(attention: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a configuration with an implementation of attention.

    Args:
        attention: `sdpa`, `flash`, `eager`, or None for the choice of transformers.
        options: The other options.

    Raises:
        ValueError: If the options have one too, or if flash-attn or a GPU is missing.
    """
    if attention is None:
        return dict(options)
    if "attn_implementation" in options:
        raise ValueError("model.attention and model.config.attn_implementation are the same option: give one of them")
    if attention == "flash":
        missing = "the package flash-attn" if importlib.util.find_spec("flash_attn") is None else ""
        missing = missing if torch.cuda.is_available() else "a GPU"
        if missing:
            raise ValueError(f"model.attention=flash needs {missing}, which is not there: use sdpa")
    return {**options, "attn_implementation": _ATTENTIONS[attention]}


def new_config(
    family: str | None, options: Mapping[str, Any], vocab_size: int, eos_token_id: int | None
) -> PretrainedConfig:
    """Build the configuration of a family.

    Args:
        family: A model type of transformers.
        options: Values that replace the defaults of the family.
        vocab_size: The number of token ids.
        eos_token_id: The token that ends a text; None if there is none.

    Raises:
        ValueError: There is no such family, or it refuses an option.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if family is None:
        raise ValueError("there is no model: give model.family and model.config, or model.path")
    if family not in CONFIG_MAPPING:
        close = difflib.get_close_matches(family, CONFIG_MAPPING, n=1) or ["gpt2"]
        raise ValueError(f"model.family={family} is no model type of transformers; {close[0]} is one")
    defaults = AutoConfig.for_model(family)
    fixed = {"vocab_size": vocab_size, "use_cache": False, "bos_token_id": None, "eos_token_id": eos_token_id}
    if hasattr(defaults, "is_decoder"):  # without it, BERT-like models attend to the tokens that they predict
        fixed["is_decoder"] = True
    if (getattr(defaults, "pad_token_id", None) or 0) >= vocab_size:
        fixed["pad_token_id"] = None
    return _build(functools.partial(AutoConfig.for_model, family), fixed | _checked_options(defaults, options))


def pretrained_config(path: Path, family: str | None, options: Mapping[str, Any]) -> tuple[PretrainedConfig, Any]:
    """Read config.json of a pretrained folder, and apply options to it.

    Args:
        path: The folder.
        family: The expected model type; None for any.
        options: Values that replace those of config.json; dictionaries are merged.

    Returns:
        The configuration without `quantization_config`, and that `quantization_config` (None if there is none).

    Raises:
        ValueError: config.json cannot be used, is of another family, or does not allow an option.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.path={path}: config.json cannot be used: {error}") from error
    if family not in (None, config.model_type):
        raise ValueError(
            f"model.family={family}, and the model in {path} is {config.model_type}: leave out one of them"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    config.use_cache = False
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    changes = {}
    for name, value in _checked_options(config, options).items():
        current = vars(config).get(name)
        changes[name] = {**current, **value} if isinstance(current, dict) and isinstance(value, dict) else value
        if _HEADS.fullmatch(name) and value != current:  # no shape would reveal it
            raise ValueError(f"model.config.{name}={value}: the weights in {path} were trained with {current}")
    return _build(lambda **values: type(config).from_dict(config.to_dict() | values), changes), quantization


def _checked_options(defaults: PretrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options under the names of the family; raise `ValueError` for unknown names and invalid sizes."""
    # transformers accepts any argument, so that a misspelt one would have no effect.
    fields = {field.name for field in dataclasses.fields(defaults)} if dataclasses.is_dataclass(defaults) else set()
    names = {name for name in fields | vars(defaults).keys() if not name.startswith("_")} | {"attn_implementation"}
    known, checked = names | defaults.attribute_map.keys(), {}
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ValueError(f"model.config.{name}: {type(defaults).__name__} has no such option{hint}")
        default = vars(defaults).get(defaults.attribute_map.get(name, name))
        # Sizes and counts are positive; a token id may be 0.
        if type(default) is type(value) is int and default > 0 and value < 1 and not name.endswith("_id"):
            raise ValueError(f"model.config.{name} must be an integer >= 1, got {value}")
        checked[defaults.attribute_map.get(name, name)] = value
    return checked


def _build(make: Callable[..., PretrainedConfig], options: Mapping[str, Any]) -> PretrainedConfig:
    """Build a configuration with these options; raise `ValueError` for whatever a family refuses."""
    try:
        return make(**options)
    except Exception as error:
        raise ValueError(f"model.config: {error}") from error


def positions(config: PretrainedConfig) -> int:
    """Return the maximum sequence length of a model; `sys.maxsize` for models without a bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_length(config: PretrainedConfig, sequence_length: int, key: str) -> None:
    """Raise `ValueError` if the sequence length, set by the option `key`, exceeds the positions of the model."""
    if sequence_length > (maximum := positions(config)):
        raise ValueError(
            f"{key}={sequence_length} is longer than the model's {maximum} positions: shorten it, or give the model "
            "more in model.config"
        )
