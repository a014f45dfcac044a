"""Weights of a pretrained folder, converted to tensors of a model (renamed, merged, dequantized) by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distopt.layout.places import shard_dim
from distopt.models import transformers_private
from distopt.models.added_rows import AddedRows
from distopt.models.conversion import Conversion, dequantizer
from distopt.models.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer


class Weights:
    """The safetensors files of a folder, compared with a model before any value is read.

    Args:
        folder: A folder written by `save_pretrained`.

    Attributes:
        notes: Tensors that the model does not need, or initializes itself, one line each.

    Raises:
        ValueError: The files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes, self._files = folder, list[str](), SafetensorsFolder(folder)
        self._tensors = self._files.tensors()
        self._model: PreTrainedModel
        self._conversions: dict[str, Conversion]  # by target
        self._added: AddedRows | None = None

    @property
    def bytes_read(self) -> int:
        """The size of the values that `read` has read from the files."""
        return self._files.bytes_read

    def compare(self, model: PreTrainedModel, quantization: Any = None, added: AddedRows | None = None) -> None:
        """Match the tensors of the files with those of a model.

        Args:
            model: A model on the meta device, as transformers builds it; it must remain unchanged.
            quantization: `quantization_config` of config.json, or None.
            added: The rows of additional tokens, which the files do not have.

        Raises:
            ValueError: transformers does not undo the quantization while loading, or the files do not match the model:
                a tensor is missing in the files, has another shape, or consists of quantized codes without their
                scales, or the model has no such tensor although it has the module that it belongs to.
        """
        self._model, self._conversions, self.notes, self._added = model, {}, [], added
        expected, unexpected = model.state_dict(), set[str]()
        for conversion in self._plan(expected, unexpected, dequantizer(quantization)):
            for name, value in conversion(model, self._tensors).items():
                if name in expected:
                    self._check(name, value, expected[name], conversion)
                    self._conversions[name] = conversion
                else:
                    unexpected.add(name)
        self._compare(expected, unexpected)

    def read(
        self, names: Mapping[str, Tensor], share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
        """Read these tensors as far as the files contain them.

        Args:
            names: The tensors of the model, by name.
            share: An index and a count: of each parameter that is in the files as it is in the model only this one of
                `count` equal shares of its rows is read, as FSDP2 shards it, and of stacked experts only those of the
                share. Buffers, and parameters that are converted in another way, are read entirely.

        Yields:
            The name, the value on the CPU, and the first and the last row, exclusive, that it has.
        """
        wanted = {id(c): c for name in names if (c := self._conversions.get(name)) is not None}
        with self._files.reading() as reader:
            for conversion in wanted.values():
                readers, rows, stacked = {}, None, None
                target = names.get(conversion.target)
                if isinstance(target, nn.Parameter):
                    rows = _rows(target, *share) if conversion.renames else None
                    conversion, stacked = (conversion, None) if rows else self._stacked(conversion, target, *share)
                if stacked and stacked[0] == stacked[1]:  # fewer experts than shares
                    continue
                added = self._added if self._added and self._added.needed(conversion.target, rows) else None
                for _, name in conversion.sources:
                    readers[name] = partial(reader, name, None if added else rows)
                for name, value in conversion(self._model, readers).items():
                    if name in names:
                        value = added.extend(value, rows, len(names[name])) if added else value
                        yield name, value, rows or stacked or (0, len(value) if value.ndim else 1)

    def _stacked(
        self, conversion: Conversion, target: Tensor, index: int, count: int
    ) -> tuple[Conversion, tuple[int, int] | None]:
        """Return a conversion to some rows of a target, if each row is made of tensors of its own, as experts are.

        Returns:
            The conversion to the rows of this share and these rows; the given one and None where it is not so.
        """
        rows = _rows(target, index, count)
        by_pattern: dict[str, list[tuple[str, str]]] = {}
        for pattern, name in conversion.sources:
            by_pattern.setdefault(pattern, []).append((pattern, name))
        if rows is None or any(len(names) != len(target) for names in by_pattern.values()):
            return conversion, None

        def part(start: int, stop: int) -> Conversion:
            sources = [source for names in by_pattern.values() for source in names[start:stop]]
            return Conversion(conversion.transform, conversion.target, sources)

        shapes = {name: value.shape for name, value in part(0, 1)(self._model, self._tensors).items()}
        fits = shapes == {conversion.target: (1, *target.shape[1:])}
        return (part(*rows), rows) if fits else (conversion, None)

    def _plan(
        self, expected: dict[str, Tensor], unexpected: set[str], quantizer: HfQuantizer | None
    ) -> list[Conversion]:
        """Return the conversions to the model's tensors; add targets that the model lacks to `unexpected`."""
        # Follows convert_and_load_state_dict_in_model of transformers 5.23 (core_model_loading.py), which loads a full
        # model at once.
        converter_class, renaming_class, key, rename_source_key = (
            transformers_private.read("core_model_loading", name)
            for name in ("WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key")
        )
        get_mapping = transformers_private.read("conversion_mapping", "get_model_conversion_mapping")

        mapping = get_mapping(self._model, hf_quantizer=quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, renaming_class)]
        converters = [entry for entry in mapping if isinstance(entry, converter_class)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, conversions = self._model.base_model_prefix, dict[str, Conversion]()
        for name in sorted(self._tensors, key=key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                unexpected.add(target)
                continue
            if target not in conversions:
                transform = renaming_class(name, target) if pattern is None else by_pattern[pattern]
                conversions[target] = Conversion(transform, target, [])
            conversions[target].sources.append((pattern or name, name))
        return list(conversions.values())

    def _check(self, name: str, value: Tensor, expected: Tensor, conversion: Conversion) -> None:
        """Raise `ValueError` if a converted tensor does not fit that of the model."""
        file = self._files.paths[conversion.sources[0][1]]
        if value.shape != expected.shape and not (self._added and self._added.fit(name, value, expected)):
            raise ValueError(f"{name} is {list(value.shape)} in {file}, {list(expected.shape)} in the model")
        # Quantized codes are meaningless without their scales, and copy_ would treat them as the weights themselves.
        if expected.is_floating_point() and (not value.is_floating_point() or value.itemsize < 2):
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {dtype} in {file}, without a quantization_config in config.json that says how to undo it: "
                "give a folder with weights in float32, bfloat16 or float16"
            )

    def _compare(self, expected: Mapping[str, Tensor], unexpected: set[str]) -> None:
        """Raise `ValueError` for missing and unexpected tensors, unless they are harmless: those become notes."""
        missing = set(expected) - set(self._conversions)
        for one, other in transformers_private.method(self._model, "all_tied_weights_keys").items():
            if one in self._conversions or other in self._conversions:
                missing -= {one, other}
        keys: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
        # Removes those that transformers declares harmless.
        transformers_private.method(self._model, "_adjust_missing_and_unexpected_keys")(keys)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in (name for name in expected if name in keys.missing_keys):
            if name in parameters:
                raise ValueError(f"{self.folder} has no weights for {name}")
            self.notes.append(f"{self.folder} has no {name}: it is initialized by the model's family")
        if changing := sorted(name for name in keys.unexpected_keys if self._computes(name)):
            raise ValueError(
                f"{self.folder} has {_listed(changing)}, which {type(self._model).__name__} does not use: its "
                "config.json describes another model than that of its weights"
            )
        if others := sorted(keys.unexpected_keys):
            self.notes.append(f"{self.folder} has {_listed(others)}, which {type(self._model).__name__} does not need")

    def _computes(self, name: str) -> bool:
        """Return whether an unexpected tensor would take part in what the model computes.

        This holds within a block, for an additional member of a list, and in a module that the model has; not for
        separate heads and poolers.
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
        """Return the names of the model's blocks."""
        kinds = set(self._model._no_split_modules or ())
        return [name for name, module in self._model.named_modules() if type(module).__name__ in kinds]


def _rows(tensor: Tensor, index: int, count: int) -> tuple[int, int] | None:
    """Return the rows of one of `count` shares of a tensor, as `torch.chunk` divides it; None for all of them.

    Those of a parameter that FSDP2 shards along another dimension are all.
    """
    if count == 1 or not tensor.ndim or shard_dim(tensor.shape, count) != 0:
        return None
    size = -(-len(tensor) // count)
    return min(index * size, len(tensor)), min((index + 1) * size, len(tensor))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
