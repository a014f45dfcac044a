"""The weights of a pretrained folder as the tensors of a model: renamed, merged and dequantized by transformers."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Conversion:
    """How some tensors of the files become some of the model: a transform of transformers, by its first target."""

    transform: Any
    first: str
    sources: list[tuple[str, str]]  # pattern of the transform, name in the files

    def __call__(self, model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of the model, by name. tensors: those of the files, or functions that read them."""
        transform = copy.deepcopy(self.transform)  # a conversion consumes what it was given
        for pattern, name in self.sources:
            transform.add_tensor(self.first, name, pattern, tensors[name])
        made = transform.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Weights:
    """The safetensors files of a folder, compared with a model before any value is read.

    Args:
        folder: one that `save_pretrained` wrote.

    Attributes:
        notes: what the files have and the model does not need, one line each.

    Raises:
        ValueError: for files that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, list[str]()
        self._files = _files(folder)
        self._tensors = self._described()
        self._model: PreTrainedModel
        self._conversions: dict[str, _Conversion]  # by target

    def compare(self, model: PreTrainedModel, quantization: Any = None) -> None:
        """Finds what becomes of each tensor of the files in a model.

        Args:
            model: on the meta device, as transformers made it; it has to stay so.
            quantization: `quantization_config` of config.json, or None.

        Raises:
            ValueError: for a quantization that transformers does not undo while it loads, and where files and model
                differ: a tensor that the files lack, or have in another shape, or as codes without their scales; a
                tensor that the model lacks, though it has the module that the tensor belongs to.
        """
        self._model, self._conversions, self.notes = model, {}, []
        expected, unexpected = model.state_dict(), set[str]()
        for conversion in self._planned(expected, unexpected, _dequantizer(quantization)):
            made = conversion(model, self._tensors)
            for name, value in made.items():
                if name in expected:
                    self._check(name, value, expected[name], conversion)
                    self._conversions[name] = conversion
                else:
                    unexpected.add(name)
        self._compare(expected, unexpected)

    def read(self, names: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the values of those of the model's tensors that the files have, on the CPU, as they are converted."""
        wanted = {id(c): c for name in names if (c := self._conversions.get(name)) is not None}
        with contextlib.ExitStack() as opened:
            files = {}
            for conversion in wanted.values():
                readers = {}
                for _, name in conversion.sources:
                    path = self._files[name]
                    if path not in files:
                        files[path] = opened.enter_context(_open(path))
                    readers[name] = lambda file=files[path], name=name: file.get_tensor(name)
                for name, value in conversion(self._model, readers).items():
                    if name in names:
                        yield name, value

    def _described(self) -> dict[str, Tensor]:
        """The tensors of the files on the meta device."""
        from transformers.modeling_utils import str_to_torch_dtype as dtypes

        dtypes = {**dtypes, "F8_E8M0": torch.float8_e8m0fnu}
        found = {}
        for path in dict.fromkeys(self._files.values()):
            with _open(path) as file:
                there = set(file.keys())
                for name in (name for name, where in self._files.items() if where == path):
                    if name not in there:
                        raise ValueError(f"{path} has no {name}, which the index says it has: download it again")
                    part = file.get_slice(name)
                    if part.get_dtype() not in dtypes:
                        raise ValueError(f"{name} is {part.get_dtype()} in {path}, which torch does not have")
                    found[name] = torch.empty(part.get_shape(), dtype=dtypes[part.get_dtype()], device="meta")
        return found

    def _planned(self, expected: dict[str, Tensor], unexpected: set[str], quantizer: Any) -> list[_Conversion]:
        """The conversions that give the model's tensors; what no conversion takes becomes `unexpected`."""
        # As convert_and_load_state_dict_in_model of transformers 5.23 (core_model_loading.py) goes about it, which
        # loads a whole model at once.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model, hf_quantizer=quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, planned = self._model.base_model_prefix, dict[str, _Conversion]()
        for name in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                unexpected.add(target)
                continue
            if target not in planned:
                transform = WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
                planned[target] = _Conversion(transform, target, [])
            planned[target].sources.append((pattern or name, name))
        return list(planned.values())

    def _check(self, name: str, value: Tensor, expected: Tensor, conversion: _Conversion) -> None:
        file = self._files[conversion.sources[0][1]]
        if value.shape != expected.shape:
            raise ValueError(f"{name} is {list(value.shape)} in {file}, {list(expected.shape)} in the model")
        # Such codes mean nothing without their scales, and copy_ would take them for the weights themselves.
        if expected.is_floating_point() and (not value.is_floating_point() or value.itemsize < 2):
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {dtype} in {file}, without a quantization_config in config.json that says how to undo it: "
                "give a folder with weights in float32, bfloat16 or float16"
            )

    def _compare(self, expected: Mapping[str, Tensor], unexpected: set[str]) -> None:
        missing = set(expected) - set(self._conversions)
        for one, other in self._model.all_tied_weights_keys.items():
            if one in self._conversions or other in self._conversions:
                missing -= {one, other}
        keys: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
        self._model._adjust_missing_and_unexpected_keys(keys)  # what transformers knows to be harmless
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in (name for name in expected if name in keys.missing_keys):
            if name in parameters:
                raise ValueError(f"{self.folder} has no weights for {name}")
            self.notes.append(f"{self.folder} has no {name}: it starts as the model's family sets it")
        if changing := sorted(name for name in keys.unexpected_keys if self._computes(name)):
            raise ValueError(
                f"{self.folder} has {_listed(changing)}, which {type(self._model).__name__} does not use: its "
                "config.json describes another model than its weights are of"
            )
        if others := sorted(keys.unexpected_keys):
            self.notes.append(f"{self.folder} has {_listed(others)}, which {type(self._model).__name__} does not need")

    def _computes(self, name: str) -> bool:
        """Whether a tensor that the model lacks belongs to what the model computes.

        That is so within a block, for another member of a list, and in a module that the model has; not for heads and
        poolers beside it.
        """
        if any(name.startswith(f"{block}.") for block in self._blocks()):
            return True
        path, _, _ = name.rpartition(".")
        modules = dict(self._model.named_modules())
        if path in modules:
            return True
        while path and path not in modules:
            path = path.rpartition(".")[0]
        return isinstance(modules[path], nn.ModuleList)

    def _blocks(self) -> list[str]:
        kinds = set(self._model._no_split_modules or ())
        return [name for name, module in self._model.named_modules() if type(module).__name__ in kinds]


def _files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        with _open(folder / "model.safetensors") as file:
            return dict.fromkeys(file.keys(), folder / "model.safetensors")
    if not index.is_file():
        raise ValueError(f"model.path={folder}: no model.safetensors there; save the model with safetensors")
    try:
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}): download it again") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again") from error


def _dequantizer(quantization: Any) -> Any:
    """transformers' quantizer of a folder, made to give plain weights; None for a folder that is not quantized."""
    if quantization is None:
        return None
    from transformers.quantizers import AutoHfQuantizer

    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    refused = (
        f"the weights are quantized (quantization_config in config.json: {method}), which transformers does not undo "
        "while it loads them here: give the folder of the full model, or load this one with transformers, "
        "model.dequantize(), and save_pretrained"
    )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
        if "dequantize" not in getattr(quantizer, "get_load_operations", dict)():  # transformers 5.20 has none yet
            raise ValueError(refused)
        quantizer.quantization_config.dequantize = True
        quantizer.validate_environment()
    except (ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(refused if str(error) == refused else f"{refused} ({error})") from error
    return quantizer


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
