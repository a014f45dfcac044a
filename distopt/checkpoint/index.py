"""What the files of a checkpoint contain: the index of format 2, and the metadata of format 1."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from distopt.checkpoint.shards import Chunk, Index, Stored, file_name
from distopt.checkpoint.storage import Storage

NAME = "index.json"
DCP_METADATA = ".metadata"  # of torch's distributed checkpoints (DCP), in which format 1 stores tensors


def read(storage: Storage, version: int) -> Index:
    """Reads the index of a checkpoint of this format.

    Raises:
        ValueError: If it cannot be read.
    """
    name = DCP_METADATA if version == 1 else NAME
    try:
        data = storage.read(name)
        return _dcp(data) if version == 1 else _json(data)
    except Exception as error:  # of any class, by what the bytes happen to say
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


def _json(data: bytes) -> Index:
    index = {}
    for name, (dtype_name, shape, chunks) in json.loads(data).items():
        dtype, dims = _dtype(dtype_name), len(shape)
        stored = []
        for rank, position, *box in chunks:
            sizes = tuple(box[dims:])
            length = math.prod(sizes) * dtype.itemsize
            stored.append(Chunk(file_name(rank), position, length, tuple(box[:dims]), sizes))
        index[name] = Stored(dtype, tuple(shape), stored)
    return index


def _dcp(data: bytes) -> Index:
    metadata = _DCPUnpickler(io.BytesIO(data)).load()
    places = {(at.fqn, tuple(at.offset or ())): info for at, info in metadata.storage_data.items()}
    index = {}
    for name, tensor in metadata.state_dict_metadata.items():
        stored = []
        for chunk in getattr(tensor, "chunks", ()):  # nothing for objects
            info = places[name, tuple(chunk.offsets)]
            box = tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,)
            stored.append(Chunk(info.relative_path, info.offset, info.length, *box, pickled=True))
        if stored:
            index[name] = Stored(tensor.properties.dtype, tuple(tensor.size) or (1,), stored)
    return index


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


class _DCPUnpickler(pickle.Unpickler):
    """Unpickles the metadata of DCP, of whose classes none runs code of the file; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class of DCP's metadata.

        Raises:
            pickle.UnpicklingError: For any other name.
        """
        allowed = _dcp_classes()
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")
        return allowed[module, name]


def _dcp_classes() -> Mapping[tuple[str, str], Any]:
    from pathlib import PosixPath

    from torch.distributed.checkpoint import filesystem, metadata

    names = (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
    allowed: dict[tuple[str, str], Any] = {(metadata.__name__, name): getattr(metadata, name) for name in names}
    allowed[filesystem.__name__, "_StorageInfo"] = filesystem._StorageInfo
    allowed["torch", "Size"] = torch.Size
    allowed |= {(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")}  # of Python 3.13
    allowed["torch.serialization", "_get_layout"] = _layout
    allowed |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return allowed


def _layout(name: str) -> torch.layout:
    return torch.strided
