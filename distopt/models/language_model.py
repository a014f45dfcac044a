"""Language models from `transformers`: made without memory, filled with values unit by unit."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt.data import tokenizers
from distopt.models import lora
from distopt.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# How weights are divided among heads, which their shapes do not tell.
_HEADS = re.compile(r"(n|num)_(\w+_)?heads?|(\w+_)?head_dim")


class LanguageModel:
    """A causal language model of `transformers`, by configuration or from a pretrained folder on disk.

    `empty` makes it on the meta device; `fill` gives one unit (a decoder block, or what is outside of the blocks)
    memory and values. An engine fills a unit and shards it before it fills the next, so that no rank holds more than
    one full unit. The values depend on (seed, unit) alone: the model is the same at every world size, on every engine.

    Args:
        family: a model type of transformers, such as `gpt2` or `llama`; None with a path.
        config: the arguments of its configuration (sizes, `rope_parameters`, `attn_implementation`, ...), whose
            defaults are the family's. With a path they change what its config.json says, in everything but sizes.
        path: a folder written by `save_pretrained`, with config.json and safetensors. Weights that are quantized in a
            way that transformers can undo while it loads them (fp8, mxfp4) become plain ones.
        seed: of the initial values.

    Attributes:
        notes: what the user should know of a pretrained folder, one line each; known once `empty` was called.
    """

    def __init__(
        self,
        family: str | None = None,
        config: Mapping[str, Any] | None = None,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"model.seed must be an integer, got {seed!r}")
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"model.config must be options by name, as {{n_layer: 4}}, got {config!r}")
        for name, value in (("family", family), ("path", path)):
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"model.{name} must be text, or null, got {value!r}")
        self.family, self.config, self.seed = family, dict(config or {}), seed
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not (self.path / "config.json").is_file():
            raise ValueError(f"model.path={path}: no config.json there; give a folder written by save_pretrained")
        self._quantization: Any = None
        self._weights = None if self.path is None else Weights(self.path)

    @property
    def notes(self) -> list[str]:
        return self._weights.notes if self._weights else []

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the data are, before anything that takes time."""
        config = self.describe(1)
        text = config.get_text_config()
        heads, shared = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:  # no family refuses it
            raise ValueError(f"model.config.num_key_value_heads={shared} does not divide the {heads} attention heads")
        if self.path is not None:
            self.empty(config)

    def check_tokenizer(self, tokenizer: str | None) -> None:
        """Raises ValueError for a tokenizer that gives a pretrained model's own tokens other ids.

        tokenizer: a folder; None for bytes. It may have tokens beside those of the model's own.
        """
        if self.path is None or tokenizer == str(self.path) or not tokenizers.has_tokenizer(self.path):
            return
        own, other = (tokenizers.load(folder).pretrained().get_vocab() for folder in (str(self.path), tokenizer))
        if differ := [token for token, index in own.items() if other.get(token) != index]:
            given = "null (bytes)" if tokenizer is None else tokenizer
            raise ValueError(
                f"data.tokenizer={given} is not the tokenizer of the model in {self.path}: {len(differ)} of its "
                f"{len(own)} tokens have other ids, as {differ[0]!r}; leave "
                "data.tokenizer out, and the model's own is used"
            )

    def describe(self, vocab_size: int, eos_token_id: int | None = None) -> PretrainedConfig:
        """The configuration, for a vocabulary of this size; a pretrained one must be at least as large."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self._new(vocab_size, eos_token_id) if self.path is None else self._pretrained(self.path)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is no family of causal language models in transformers: use another")
        size = getattr(config.get_text_config(), "vocab_size", vocab_size)
        if size < vocab_size:
            where = f"the model in {self.path} only {size}: set data.tokenizer to the model's own"
            if self.path is None:
                where = f"model.config.vocab_size={size} is less: leave it out"
            raise ValueError(f"the data has {vocab_size} tokens, {where}")
        return config

    def _pretrained(self, path: Path) -> PretrainedConfig:
        """What config.json says, with the changes of `config`."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"model.path={path}: config.json cannot be used: {error}") from error
        if self.family not in (None, found.model_type):
            raise ValueError(
                f"model.family={self.family}, and the model in {path} is {found.model_type}: leave out one of them"
            )
        self._quantization = getattr(found, "quantization_config", None)
        if self._quantization is not None:
            del found.quantization_config
        found.use_cache = False
        if hasattr(found, "is_decoder"):
            found.is_decoder = True
        changes = {}
        for name, value in self._options(found).items():
            usual = vars(found).get(name)
            changes[name] = {**usual, **value} if isinstance(usual, dict) and isinstance(value, dict) else value
            if _HEADS.fullmatch(name) and value != usual:  # no shape would tell
                raise ValueError(f"model.config.{name}={value}: the weights in {path} are of {usual}")
        return _configured(lambda **options: type(found).from_dict(found.to_dict() | options), changes)

    def _new(self, vocab_size: int, eos_token_id: int | None) -> PretrainedConfig:
        """The configuration of a family, with the sizes of `config`."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.family is None:
            raise ValueError("there is no model: give model.family and model.config, or model.path")
        if self.family not in CONFIG_MAPPING:
            meant = difflib.get_close_matches(self.family, CONFIG_MAPPING, n=1) or ["gpt2"]
            raise ValueError(f"model.family={self.family} is no model type of transformers; {meant[0]} is one")
        standard = AutoConfig.for_model(self.family)
        fixed = {"vocab_size": vocab_size, "use_cache": False, "bos_token_id": None, "eos_token_id": eos_token_id}
        if hasattr(standard, "is_decoder"):  # without it BERT and its kin see the tokens that they are to predict
            fixed["is_decoder"] = True
        if (getattr(standard, "pad_token_id", None) or 0) >= vocab_size:
            fixed["pad_token_id"] = None
        return _configured(functools.partial(AutoConfig.for_model, self.family), fixed | self._options(standard))

    def _options(self, standard: PretrainedConfig) -> dict[str, Any]:
        """The options of `config`, by the names that the family gives them."""
        # transformers takes any argument, and a misspelt one would do nothing.
        own = {field.name for field in dataclasses.fields(standard)} if dataclasses.is_dataclass(standard) else set()
        own = {name for name in own | vars(standard).keys() if not name.startswith("_")} | {"attn_implementation"}
        known, options = own | standard.attribute_map.keys(), {}
        for name, value in self.config.items():
            if name not in known:
                meant = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {meant[0]}?" if meant else ""
                raise ValueError(f"model.config.{name}: {type(standard).__name__} has no such option{hint}")
            usual = vars(standard).get(standard.attribute_map.get(name, name))
            # Sizes and numbers of things; what an id says may be 0.
            if type(usual) is type(value) is int and usual > 0 and value < 1 and not name.endswith("_id"):
                raise ValueError(f"model.config.{name} must be an integer >= 1, got {value}")
            options[standard.attribute_map.get(name, name)] = value
        return options

    def empty(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model on the meta device: shapes without memory.

        Raises ValueError where the configuration does not make one, or a pretrained folder has not its weights.
        """
        model = _on_meta(config)
        if self._weights is not None:
            try:
                self._weights.compare(_on_meta(config), self._quantization)
            except ValueError as error:
                if not self.config:
                    raise
                given = ", ".join(f"{name}={value}" for name, value in self.config.items())
                raise ValueError(
                    f"{error} (with model.config {given}, and the sizes of weights cannot change; model=pretrained has "
                    "those of the folder)"
                ) from error
        return model

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, unit: nn.Module, device: torch.device) -> None:
        """Gives a unit's meta tensors memory and values: the family's own initialisation, or the file's.

        unit: one of `blocks(model)`, or the model itself for what lies outside of them.
        """
        names = {module: name for name, module in model.named_modules()}
        modules = list(_own_modules(unit, set(blocks(model)) - {unit}))
        for module in modules:
            if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device=device, recurse=False)
                for p in module.parameters(recurse=False):
                    p.fill_(math.nan)  # what the family leaves as it was is seen below
        if unit is model:
            model.tie_weights()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{names[unit]}".encode()))
            for module in modules:
                model._init_weights(module)
                lora.reset(module)
        others = {id(p) for block in blocks(model) if block is not unit for p in block.parameters()}  # tied to them
        if self._weights is None:
            for module in modules:
                for name, p in module.named_parameters(recurse=False):
                    if id(p) not in others and p.isnan().any():
                        raise ValueError(
                            f"{type(model).__name__} gives {names[module]}.{name} no first value by itself: start from "
                            "a pretrained folder (model.path), or use another family"
                        )
            return
        tensors: dict[str, Tensor] = {}
        for module in modules:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                full = lora.pretrained_name(f"{names[module]}.{name}" if names[module] else name)
                if full is not None and id(tensor) not in others and name not in module._non_persistent_buffers_set:
                    tensors[full] = tensor
        read: dict[int, str] = {}
        for name, value in self._weights.read(tensors):
            tensor = tensors[name]
            if (first := read.setdefault(id(tensor), name)) != name and not torch.equal(tensor, value.to(tensor)):
                raise ValueError(
                    f"{self.path} has other weights for {name} than for {first}, and its config.json says that they "
                    "are tied: give model.config.tie_word_embeddings=false, or remove one of them"
                )
            tensor.copy_(value)


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever a family makes of an option that it cannot be built with
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"model.config: {type(config).__name__} makes no model ({reason})") from error


def _configured(make: Callable[..., PretrainedConfig], options: Mapping[str, Any]) -> PretrainedConfig:
    """A configuration with these options; what a family refuses is a ValueError."""
    try:
        return make(**options)
    except Exception as error:
        raise ValueError(f"model.config: {error}") from error


def positions(config: PretrainedConfig) -> int:
    """How long a sequence may be; sys.maxsize for models without a bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_length(config: PretrainedConfig, sequence_length: int, key: str) -> None:
    """Raises ValueError for sequences that are longer than the model has positions."""
    if sequence_length > (most := positions(config)):
        raise ValueError(
            f"{key}={sequence_length} is longer than the model's {most} positions: shorten it, or give the model more "
            "in model.config"
        )


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
