"""Language models from `transformers`: made without memory, filled with values unit by unit."""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt import adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LanguageModel:
    """A causal language model of `transformers`, by configuration or from a pretrained folder on disk.

    `empty` makes it on the meta device; `fill` gives one unit (a decoder block, or what is outside of the blocks)
    memory and values. An engine fills a unit and shards it before it fills the next, so that no rank holds more than
    one whole unit. The values depend on (seed, unit) alone: the model is the same at every world size, on every engine.

    Args:
        family: a model type of transformers, such as `gpt2` or `llama`; ignored with a path.
        config: the arguments of its configuration (sizes, `rope_parameters`, ...); ignored with a path.
        path: a folder written by `save_pretrained`, with config.json and safetensors.
        seed: of the initial values.
    """

    def __init__(
        self,
        family: str = "gpt2",
        config: Mapping[str, Any] | None = None,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"model.seed must be an integer, got {seed!r}")
        self.family, self.config, self.seed = family, dict(config or {}), seed
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not (self.path / "config.json").is_file():
            raise ValueError(f"model.path={path}: no config.json there; give a folder written by save_pretrained")
        self._weights = _Weights(self.path) if self.path is not None else None

    def describe(self, vocab_size: int, eos_token_id: int | None = None) -> PretrainedConfig:
        """The configuration, for a vocabulary of this size; a pretrained one must be at least as large."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.path is not None:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True)
            if config.vocab_size < vocab_size:
                raise ValueError(
                    f"the data has {vocab_size} tokens, the model in {self.path} only {config.vocab_size}: "
                    "set data.tokenizer to the model's own"
                )
            config.use_cache = False
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            return config
        if self.family not in CONFIG_MAPPING:
            meant = difflib.get_close_matches(self.family, CONFIG_MAPPING, n=1) or ["gpt2"]
            raise ValueError(f"model.family={self.family} is no model type of transformers; {meant[0]} is one")
        standard = AutoConfig.for_model(self.family)
        # transformers takes any argument, and a misspelt one would do nothing.
        if unknown := [name for name in self.config if not hasattr(standard, name)]:
            meant = difflib.get_close_matches(unknown[0], dir(standard), n=1)
            hint = f": did you mean {meant[0]}?" if meant else ""
            raise ValueError(f"model.config.{unknown[0]}: {type(standard).__name__} has no such option{hint}")
        for name, value in self.config.items():
            usual = getattr(standard, name)
            # Sizes and numbers of things; what an id says may be 0.
            if type(usual) is type(value) is int and usual > 0 and value < 1 and not name.endswith("_id"):
                raise ValueError(f"model.config.{name} must be an integer >= 1, got {value}")
        fixed = {"vocab_size": vocab_size, "use_cache": False, "bos_token_id": None, "eos_token_id": eos_token_id}
        if hasattr(standard, "is_decoder"):  # without it BERT and its kin see the tokens that they are to predict
            fixed["is_decoder"] = True
        try:
            return AutoConfig.for_model(self.family, **fixed | self.config)
        except StrictDataclassError as error:
            raise ValueError(f"model.config: {error}") from error

    def empty(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model on the meta device: shapes without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, unit: nn.Module, device: torch.device) -> None:
        """Gives a unit's meta tensors memory and values: the family's own initialisation, or the file's.

        unit: one of `blocks(model)`, or the model itself for what lies outside of them.
        Raises ValueError if the pretrained folder lacks a parameter or has it in another shape.
        """
        names = {module: name for name, module in model.named_modules()}
        modules = list(_own_modules(unit, set(blocks(model)) - {unit}))
        for module in modules:
            if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device=device, recurse=False)
        if unit is model:
            model.tie_weights()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{names[unit]}".encode()))
            for module in modules:
                model._init_weights(module)
                adapter.reset(module)
        if self._weights is not None:
            tied = {id(p) for p in model.get_input_embeddings().parameters()} if unit is model else set()
            for module in modules:
                for name, p in module.named_parameters(recurse=False):
                    full = adapter.pretrained_name(f"{names[module]}.{name}" if names[module] else name)
                    if full is None:
                        continue
                    self._weights.read_into(p, full, model.base_model_prefix, optional=id(p) in tied)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model: the units that engines shard and gather one at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # By every base class: fully_shard puts a class of its own name in front.
    return [module for module in model.modules() if names & {cls.__name__ for cls in type(module).__mro__}]


def _own_modules(unit: nn.Module, foreign: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules of a unit, children before parents (as transformers initialises), without those of other units."""
    for child in unit.children():
        if child not in foreign:
            yield from _own_modules(child, foreign)
    yield unit


class _Weights:
    """The safetensors files of a folder, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {n: folder / f for n, f in json.loads(index.read_text())["weight_map"].items()}
        elif (folder / "model.safetensors").is_file():
            from safetensors import safe_open

            with safe_open(folder / "model.safetensors", "pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise ValueError(f"model.path={folder}: no model.safetensors there; save the model with safetensors")

    def read_into(self, param: Tensor, name: str, prefix: str, optional: bool) -> None:
        """Copies the file's values; `optional` for a tied parameter, which is filed under one of its names."""
        from safetensors import safe_open

        found = next((n for n in (name, name.removeprefix(prefix + ".")) if n in self.files), None)
        if found is None:
            if optional:
                return
            raise ValueError(f"{next(iter(self.files.values())).parent} has no weights for {name}")
        with safe_open(self.files[found], "pt") as file:
            value = file.get_tensor(found)
        if value.shape != param.shape:
            raise ValueError(f"{name} is {list(value.shape)} in {self.files[found]}, {list(param.shape)} in the model")
        param.copy_(value)
