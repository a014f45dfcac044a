"""Models on the meta device: the one to train, and how its modules are filled; and muP's base model, shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from distopt import init

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Options that grow with the width of a model, by the names that transformers maps to those of each family.
_WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner")


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device, in float32."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # families raise errors of any class for options that they do not support
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        fault = next(_repeated(config.to_diff_dict(), reason), "")
        raise ValueError(f"model.config{fault}: {type(config).__name__} builds no model ({reason})") from error


def _repeated(options: Mapping[str, object], reason: str) -> Iterator[str]:
    """Yields the options whose text an error repeats, as `.name=value`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from (f".{name}{inner}" for inner in _repeated(value, reason))
        elif isinstance(value, str) and repr(value) in reason:
            yield f".{name}={value}"


def base_shapes(config: PretrainedConfig, base_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of muP's base model by name; the arguments and the error are those of `base_config`."""
    return init.base_shapes(on_meta(base_config(config, base_width)))


def base_config(config: PretrainedConfig, base_width: int) -> PretrainedConfig:
    """Return the configuration of muP's base model: narrower, with fewer heads of the same size.

    The scale of attention, 1 / sqrt(head size), is then the same in both, as muP's 1 / (head size) would be.

    Args:
        config: The configuration of the model.
        base_width: The hidden size of the base model.

    Raises:
        ValueError: If the hidden size, a number of heads or another width is no multiple of that of a base model.
    """
    width = config.hidden_size
    if base_width > width or width % base_width:
        raise ValueError(
            f"init.base_width={base_width} must divide the model's width of {width}: choose a divisor of {width}"
        )
    narrow = copy.deepcopy(config)
    for name in _WIDTHS:
        size = getattr(config, name, None)
        if isinstance(size, int):
            if size * base_width % width:
                raise ValueError(
                    f"init.base_width={base_width} is {width // base_width} times narrower than the model, and "
                    f"{name}={size} is no multiple of that: choose another base_width, or another {name} (heads have "
                    "the same size in both models)"
                )
            setattr(narrow, name, size * base_width // width)
    return narrow


def own_modules(unit: nn.Module, other_units: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules of a unit without those of other units, children first, as transformers initializes them."""
    for child in unit.children():
        if child not in other_units:
            yield from own_modules(child, other_units)
    yield unit


def check_initialized(model: PreTrainedModel, modules: Mapping[str, nn.Module], tied: set[int]) -> None:
    """Raise `ValueError` for a parameter that the family did not initialize."""
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in tied and p.isnan().any():
                raise ValueError(
                    f"{type(model).__name__} does not initialize {path}.{name}: start from a pretrained folder "
                    "(model.path), or use another family"
                )
