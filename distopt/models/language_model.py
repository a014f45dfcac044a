"""Language models of transformers, built on the meta device and materialized unit by unit."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt.bounds import ATTENTION, FAMILY, MODEL_CONFIG, PATH, SEED, TOKENS, or_null, switch
from distopt.data import hub
from distopt.models import freezing, lora, vocabulary
from distopt.models.added_rows import AddedRows
from distopt.models.configuration import attention_options, new_config, pretrained_config
from distopt.models.meta import check_initialized, on_meta, own_modules
from distopt.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A causal language model of `transformers`, by configuration or from a pretrained folder on disk.

    `empty` builds the model on the meta device; `fill` materializes one unit: a decoder block, or everything outside of
    the blocks. An engine fills and shards one unit before it fills the next, so that no rank stores more than one full
    unit. The values depend on (seed, unit) alone, so that the model is the same on every engine and at any world size.

    Args:
        family: A model type of transformers, such as `gpt2` or `llama`; None with a path.
        config: Arguments of the model's configuration (sizes, `rope_parameters`, `attn_implementation`, ...), with the
            defaults of the family. With a path they replace values of its config.json, sizes excepted.
        path: A folder written by `save_pretrained`, with config.json and safetensors, or its name on the hub. Quantized
            weights that transformers can dequantize while loading (fp8, mxfp4) become plain ones.
        seed: The seed of the initial values.
        attention: The implementation of attention: `sdpa` (`torch.nn.functional.scaled_dot_product_attention`), `flash`
            (the package flash-attn, on GPUs and in 16 bits), or `eager` (matrix products and a softmax). None is the
            choice of transformers, sdpa where the family has it.
        freeze: Regular expressions; parameters whose name one of them is found in are not trained.
        add_tokens: Special tokens that the tokenizer has in addition to those with which the model was trained. A
            pretrained model gets rows for them, the mean of its rows before.
        chunked_loss: Whether the loss is computed in chunks of tokens, without the logits of all
            (`distopt.data.cross_entropy`); None is where a micro-batch has 2^28 logits or more.

    Raises:
        ValueError: An argument is invalid, the attention is not available, or the files of `path` cannot be read.
    """

    def __init__(
        self,
        family: str | None = None,
        config: Mapping[str, Any] | None = None,
        path: str | None = None,
        seed: int = 0,
        attention: str | None = None,
        chunked_loss: bool | None = None,
        add_tokens: Sequence[str] = (),
        freeze: Sequence[str] = (),
    ) -> None:
        SEED.check("model.seed", seed)
        self._frozen = freezing.compiled(freeze)
        TOKENS.check("model.add_tokens", add_tokens)
        or_null(ATTENTION).check("model.attention", attention)
        or_null(switch()).check("model.chunked_loss", chunked_loss)
        or_null(MODEL_CONFIG).check("model.config", config)
        or_null(FAMILY).check("model.family", family)
        or_null(PATH).check("model.path", path)
        self.family, self.config, self.seed = family, attention_options(attention, config or {}), seed
        self.path = None if path is None else hub.folder("model.path", path, hub.MODEL)
        if self.path is not None and not (self.path / "config.json").is_file():
            raise ValueError(f"model.path={path}: no config.json there; give a folder written by save_pretrained")
        self.attention, self.chunked_loss = attention, chunked_loss
        self.add_tokens, self.freeze, self._added = tuple(add_tokens), list(freeze), (0, 0)
        self._quantization: Any = None
        self._weights = None if self.path is None else Weights(self.path)

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the pretrained folder, one line each; available after `empty`."""
        return self._weights.notes if self._weights else []

    def check(self) -> PreTrainedModel:
        """Return the model on the meta device, with the smallest vocabulary.

        Raises:
            ValueError: For errors that do not depend on the data.
        """
        config = self.describe(1)
        text = config.get_text_config()
        heads, shared = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:  # no family refuses it
            raise ValueError(f"model.config.num_key_value_heads={shared} does not divide the {heads} attention heads")
        return self.empty(config)

    def check_tokenizer(self, tokenizer: str | None) -> None:
        """Check that a tokenizer has the same ids as the pretrained model's own; it may have additional tokens.

        Args:
            tokenizer: A Hugging Face tokenizer folder; None for bytes.

        Raises:
            ValueError: A token of the model's own tokenizer has another id.
        """
        if self.path is not None:
            vocabulary.check_same_ids(self.path, tokenizer)

    def check_added(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` unless the added tokens have the last ids of the tokenizer of the data."""
        vocabulary.check_last_ids(self.add_tokens, tokenizer)

    def describe(self, vocab_size: int, eos_token_id: int | None = None) -> PretrainedConfig:
        """Return the configuration of the model.

        Args:
            vocab_size: The number of token ids of the data; a pretrained model must have at least as many.
            eos_token_id: The token that ends a text, for a new model.

        Raises:
            ValueError: The options do not describe a causal language model with such a vocabulary.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        if self.path is None:
            config = new_config(self.family, self.config, vocab_size, eos_token_id)
        else:
            config, self._quantization = pretrained_config(self.path, self.family, self.config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is no family of causal language models in transformers: use another")
        size = getattr(config.get_text_config(), "vocab_size", vocab_size)
        before = vocab_size - len(self.add_tokens)
        self._added = (before, vocab_size) if self.path is not None and 0 < before <= size else (0, 0)
        if self.add_tokens and size < self._added[1]:
            size = config.get_text_config().vocab_size = vocab_size
        if size < vocab_size:
            reason = f"the model in {self.path} only {size}: set data.tokenizer to the model's own"
            if self.path is None:
                reason = f"model.config.vocab_size={size} is less: leave it out"
            raise ValueError(f"the data has {vocab_size} tokens, {reason}")
        return config

    def empty(self, config: PretrainedConfig) -> PreTrainedModel:
        """Build the model on the meta device.

        Args:
            config: A configuration that `describe` returned.

        Raises:
            ValueError: The configuration is invalid, or the weights of the pretrained folder do not match it.
        """
        model = on_meta(config)
        model.chunked_loss = self.chunked_loss  # type: ignore[assignment]
        freezing.freeze(model, self._frozen)
        if self._weights is not None:
            try:
                expected = on_meta(config)
                added = AddedRows.of(expected, *self._added) if self._added[0] < self._added[1] else None
                self._weights.compare(expected, self._quantization, added)
            except ValueError as error:
                if not self.config:
                    raise
                options = ", ".join(f"{name}={value}" for name, value in self.config.items())
                raise ValueError(
                    f"{error} (with model.config {options}, and the sizes of weights cannot change; model=pretrained "
                    "uses those of the folder)"
                ) from error
        return model

    @torch.no_grad()
    def fill(
        self,
        model: PreTrainedModel,
        unit: nn.Module,
        device: torch.device,
        init: Callable[[nn.Module, list[Tensor]], None] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Materialize the meta tensors of a unit, by the family's initialization or from the pretrained files.

        Args:
            model: The model, as `empty` returned it.
            unit: One of `blocks(model)`, or the model itself for everything outside of the blocks.
            device: The device of the new tensors.
            init: Gives these parameters of the model other first values than those of the family.
            share: The index and the number of the shares of rows that processes keep of a parameter. Of pretrained
                weights only the own share is read, and the other rows are NaN.

        Raises:
            ValueError: The family leaves a parameter uninitialized, or the files contain different values for tied
                weights.
        """
        names = {module: name for name, module in model.named_modules()}
        modules = {names[module]: module for module in own_modules(unit, set(blocks(model)) - {unit})}
        for module in modules.values():
            if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device=device, recurse=False)
                for p in module.parameters(recurse=False):
                    p.fill_(math.nan)  # so that parameters without an initialization can be found
        if unit is model:
            model.tie_weights()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{names[unit]}".encode()))
            for module in modules.values():
                model._init_weights(module)
                lora.reset(module)
        tied = {id(p) for block in blocks(model) if block is not unit for p in block.parameters()}  # to other units
        if self._weights is None:
            if init is not None:
                own = (p for module in modules.values() for p in module.parameters(recurse=False))
                init(model, [p for p in own if id(p) not in tied])
            check_initialized(model, modules, tied)
        else:
            self._read(self._weights, modules, tied, share)

    def _read(self, weights: Weights, modules: Mapping[str, nn.Module], tied: set[int], share: tuple[int, int]) -> None:
        """Copy the pretrained values into the tensors of modules, except those that are `tied` to other units."""
        tensors: dict[str, Tensor] = {}
        for path, module in modules.items():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                full_name = lora.pretrained_name(f"{path}.{name}" if path else name)
                if full_name is not None and id(tensor) not in tied and name not in module._non_persistent_buffers_set:
                    tensors[full_name] = tensor
        read: dict[int, str] = {}
        for name, value, (start, stop) in weights.read(tensors, share):
            tensor = tensors[name]
            part = tensor[start:stop] if tensor.ndim else tensor
            first = read.setdefault(id(tensor), name)
            if first == name and part.numel() < tensor.numel():
                tensor.fill_(math.nan)  # rows that this process turns out to need are found by the first loss
            if first != name and not torch.equal(part, value.to(part)):
                raise ValueError(
                    f"{self.path} has other weights for {name} than for {first}, and its config.json says that they "
                    "are tied: give model.config.tie_word_embeddings=false, or remove one of them"
                )
            part.copy_(value)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a transformers model: the units that engines shard and gather one at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # Matched by all base classes, since fully_shard replaces the class of a module by a subclass.
    return [module for module in model.modules() if names & {cls.__name__ for cls in type(module).__mro__}]
