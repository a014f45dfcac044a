"""The safetensors files of a pretrained folder: which has which tensor, and tensors, or some of their rows, by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distopt.models import transformers_private

# A tensor's name and the first and last row, exclusive, that are wanted, or None for all -> the value on the CPU.
Reader = Callable[[str, "tuple[int, int] | None"], Tensor]


class SafetensorsFolder:
    """The tensors of one file, or of those that an index names.

    Args:
        folder: A folder written by `save_pretrained`.

    Attributes:
        paths: The file that contains each tensor, by the tensor's name.
        bytes_read: The size of the values that were read.

    Raises:
        ValueError: There are no such files, or the index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.paths, self.bytes_read = _paths(folder), 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors on the meta device, by name.

        Raises:
            ValueError: A file cannot be read, lacks a tensor that the index says it has, or has one in a format that
                torch does not have.
        """
        dtypes = {**transformers_private.read("modeling_utils", "str_to_torch_dtype"), "F8_E8M0": torch.float8_e8m0fnu}
        tensors = {}
        for path in dict.fromkeys(self.paths.values()):
            with _open(path) as file:
                available = set(file.keys())
                for name in (name for name, other in self.paths.items() if other == path):
                    if name not in available:
                        raise ValueError(f"{path} has no {name}, which the index says it has: download it again")
                    part = file.get_slice(name)
                    if part.get_dtype() not in dtypes:
                        raise ValueError(f"{name} is {part.get_dtype()} in {path}, which torch does not have")
                    tensors[name] = torch.empty(part.get_shape(), dtype=dtypes[part.get_dtype()], device="meta")
        return tensors

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reader]:
        """Yield a function that reads a tensor, or some of its rows; each file is opened once, when it is needed."""
        with contextlib.ExitStack() as opened:
            files: dict[Path, Any] = {}

            def read(name: str, rows: tuple[int, int] | None) -> Tensor:
                path = self.paths[name]
                if path not in files:
                    files[path] = opened.enter_context(_open(path))
                file = files[path]
                value: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]
                self.bytes_read += value.nbytes
                return value

            yield read


def _paths(folder: Path) -> dict[str, Path]:
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
    """Open a safetensors file; raise `ValueError` if that fails."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again") from error
