"""The file of a rank: written from its pieces, and read piece by piece into tensors of any sharding."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import torch
from torch import Tensor

from distopt.checkpoint.pieces import Piece, Plan, pieces
from distopt.checkpoint.storage import Storage
from distopt.proof.content import Box, content

_READ = 1 << 24  # bytes read at once to compute a checksum


class Written(NamedTuple):
    """What a rank tells of its file.

    Attributes:
        bytes: Its size.
        checksum: Its CRC-32.
        sums: The hashes of its pieces' content, int64, in the order of the plan; hashes of one tensor add up.
    """

    bytes: int
    checksum: int
    sums: Tensor


class Chunk(NamedTuple):
    """A stored piece of a tensor.

    Attributes:
        file: The name of its file.
        position: Where it begins in the file.
        length: Its size in bytes.
        offsets: The indices of its first element.
        sizes: Its shape.
        pickled: Whether `torch.save` wrote it, as in format 1; otherwise it is the bytes of a C-contiguous array.
    """

    file: str
    position: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pickled: bool = False


class Stored(NamedTuple):
    """A stored tensor: its dtype, its full shape and its chunks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]


Index = Mapping[str, Stored]


def file_name(rank: int) -> str:
    """Returns the name of the file of a rank."""
    return f"shard-{rank:05d}.bin"


def stage(plan: Plan, values: Mapping[Piece, Tensor], buffer: Tensor) -> dict[Piece, Tensor]:
    """Copies the pieces that this rank writes into a buffer of host memory.

    Args:
        plan: The plan of the save.
        values: The values of all pieces that this rank holds.
        buffer: At least `plan.size` bytes, pinned if the values are on a GPU.

    Returns:
        The copies, by piece.
    """
    staged = {}
    for piece, position in plan.own:
        place = buffer[position : position + piece.nbytes].view(getattr(torch, piece.dtype)).view(piece.sizes)
        staged[piece] = place.copy_(values[piece], non_blocking=True)
    if any(values[piece].is_cuda for piece, _ in plan.own):
        torch.cuda.current_stream().synchronize()
    return staged


def write(storage: Storage, name: str, plan: Plan, values: Mapping[Piece, Tensor]) -> Written:
    """Writes the file of this rank."""
    total, end, sums = 0, 0, []
    with storage.create(name) as file:
        for piece, position in plan.own:
            value = values[piece].detach().cpu().contiguous()
            sums.append(_content(piece, value))
            gap, data = bytes(position - end), _bytes(value)
            file.write(gap)
            file.write(data)
            total = zlib.crc32(data, zlib.crc32(gap, total))
            end = position + piece.nbytes
    return Written(end, total, torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64))


def checksum(storage: Storage, name: str) -> tuple[int, int]:
    """Returns the size in bytes and the CRC-32 of a file."""
    size = total = 0
    with storage.open(name) as file:
        while data := file.read(_READ):
            size, total = size + len(data), zlib.crc32(data, total)
    return size, total


def fill(storage: Storage, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Reads tensors from the files of a checkpoint: of each only this rank's elements, file by file.

    Args:
        storage: The folder of the files.
        index: What the files contain.
        tensors: The tensors to fill, by name; DTensors of any placements, and any dtypes.

    Raises:
        ValueError: If the checkpoint lacks some of the elements.
    """
    wanted: dict[str, list[tuple[Chunk, torch.dtype, Piece, Tensor]]] = {}
    for name, tensor in tensors.items():
        for piece, value in pieces(name, tensor):
            if (stored := index.get(name)) is None:
                raise ValueError(f"{name} is in none of its files")
            found = 0
            for chunk in stored.chunks:
                if common := _overlap(chunk, piece):
                    found += math.prod(stop - start for start, stop in common)
                    wanted.setdefault(chunk.file, []).append((chunk, stored.dtype, piece, value))
            if found != math.prod(piece.sizes):
                raise ValueError(f"its files have {found} of {math.prod(piece.sizes)} elements of {name}")
    for file_name, requests in sorted(wanted.items()):
        with storage.open(file_name) as file:
            for chunk, dtype, piece, value in sorted(requests, key=lambda request: request[0].position):
                common = _overlap(chunk, piece)
                part = _read(file, chunk, dtype, common)
                place = tuple(slice(a - o, b - o) for (a, b), o in zip(common, piece.offsets))
                value[place].copy_(part)


def contents(storage: Storage, index: Index) -> Iterator[tuple[str, Tensor]]:
    """Yields the hash of the content of each tensor, read from the files."""
    for name, stored in index.items():
        total = torch.zeros((), dtype=torch.int64)
        for chunk in stored.chunks:
            with storage.open(chunk.file) as file:
                everything = [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes)]
                part = _read(file, chunk, stored.dtype, everything)
            dtype = str(stored.dtype).removeprefix("torch.")
            total += _content(Piece(name, dtype, stored.shape, chunk.offsets, chunk.sizes), part)
        yield name, total


def _content(piece: Piece, value: Tensor) -> Tensor:
    box = Box(tuple(range(start, start + size) for start, size in zip(piece.offsets, piece.sizes)))
    return content(value, piece.shape, box)


def _bytes(value: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _overlap(chunk: Chunk, piece: Piece) -> list[tuple[int, int]]:
    """Returns the range of indices in each dimension that a chunk and a piece share; nothing if they share none."""
    boxes = zip(chunk.offsets, chunk.sizes, piece.offsets, piece.sizes)
    common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in boxes]
    return common if all(start < stop for start, stop in common) else []


def _read(file: IO[bytes], chunk: Chunk, dtype: torch.dtype, box: Sequence[tuple[int, int]]) -> Tensor:
    """Reads these ranges of indices of a chunk: only their rows from the file, if it is not pickled."""
    (first, last), *others = [(a - o, b - o) for (a, b), o in zip(box, chunk.offsets)]
    if chunk.pickled:
        file.seek(chunk.position)
        loaded = torch.load(io.BytesIO(_exactly(file, chunk.length)), map_location="cpu", weights_only=True)
        rows = loaded.view(chunk.sizes)[first:last]
    else:
        row = math.prod(chunk.sizes[1:]) * dtype.itemsize
        file.seek(chunk.position + first * row)
        rows = torch.frombuffer(_exactly(file, (last - first) * row), dtype=dtype).view(last - first, *chunk.sizes[1:])
    index = (slice(None), *(slice(start, stop) for start, stop in others))
    return rows[index]


def _exactly(file: IO[bytes], size: int) -> bytearray:
    data = bytearray(file.read(size))
    if len(data) != size:
        raise ValueError(f"a file ends {size - len(data)} bytes too early")
    return data
