"""A state buffer of which each rank has a range of consecutive elements, not the rows that DTensor's Shard(0) has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout.messages import assemble

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_aten = torch.ops.aten
# What checkpoints and copies of an optimizer do to a buffer; an update works on the local tensor.
_ELEMENTWISE = {_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.copy_, _aten.zero_, _aten.fill_}
_LIKE = {_aten.empty_like, _aten.zeros_like}


class Range(NamedTuple):
    """The elements of a flattened full tensor that this rank has: the placement of a `RangeShard`."""

    start: int
    numel: int


class RangeShard(Tensor):
    """A tensor of a full shape, of which this rank has a range of the flattened elements.

    The counterpart of a DTensor, with its attributes and methods: `to_local`, `full_tensor`, `device_mesh` and
    `placements`. torch's distributed checkpoints write the ranges as boxes of the full tensor, so that any other
    sharding can read them.

    Args:
        local: This rank's elements, flat.
        shape: The full shape.
        at: The range.
        mesh: One axis, over the ranks whose ranges make up the tensor.
    """

    _local_tensor: Tensor
    device_mesh: DeviceMesh
    placements: tuple[Range]

    @staticmethod
    def __new__(cls, local: Tensor, shape: torch.Size, at: Range, mesh: DeviceMesh) -> RangeShard:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        made._local_tensor, made.device_mesh, made.placements = local, mesh, (at,)
        return made

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def of(cls, full: Tensor, at: Range, mesh: DeviceMesh) -> RangeShard:
        """Returns this rank's range of a tensor that every rank has, in memory of its own."""
        return cls(full.detach().reshape(-1).narrow(0, *at).clone(), full.shape, at, mesh)

    def to_local(self) -> Tensor:
        """Returns this rank's elements, flat."""
        return self._local_tensor

    def full_tensor(self) -> Tensor:
        """Returns the full tensor on every rank, bit for bit. Collective: one all-reduce."""
        start, numel = self.placements[0]
        full = self._local_tensor.new_zeros(self.shape.numel())
        full[start : start + numel] = self._local_tensor
        assemble(full, [self.device_mesh.get_group()] if self.device_mesh.size() > 1 else [])
        return full.view(self.shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RangeShard(local_tensor={self._local_tensor}, shape={tuple(self.shape)}, placements={self.placements})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is _aten.new_empty:  # of torch's stager of state dicts, with the full shape
            return args[0]._with(args[0]._local_tensor.new_empty(args[0]._local_tensor.shape, **kwargs))
        if func.overloadpacket not in _ELEMENTWISE | _LIKE:
            raise NotImplementedError(f"{func} of a RangeShard: use to_local() or full_tensor()")
        if any(t.placements != args[0].placements for t in args if isinstance(t, RangeShard)):
            raise NotImplementedError(f"{func} of two RangeShards of other ranges: use full_tensor()")
        result = func(*(t._local_tensor if isinstance(t, RangeShard) else t for t in args), **kwargs)
        return args[0] if func.overloadpacket.__name__.endswith("_") else args[0]._with(result)

    def _with(self, local: Tensor) -> RangeShard:
        return RangeShard(local, self.shape, self.placements[0], self.device_mesh)

    # The protocol of torch's distributed checkpoints (torch 2.13, distributed/_checkpointable.py).

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in self._boxes()]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for offsets, sizes, start in self._boxes():
            if torch.Size(offsets) == index.offset:
                return self._local_tensor.narrow(0, start, torch.Size(sizes).numel()).view(sizes)
        raise ValueError(f"{index.fqn} has no box at {index.offset}")

    def _boxes(self) -> Iterator[tuple[list[int], list[int], int]]:
        """Yields the offsets and sizes of boxes that make up the range, and the first local element of each."""
        start, numel = self.placements[0]
        for offsets, sizes, first in boxes(tuple(self.shape), start, start + numel):
            yield offsets, sizes, first - start


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Yields the boxes that make up a range of a flattened tensor: offsets, sizes, and the first element of each.

    Full rows are one box; the part of a row before them and the one after are divided likewise.
    """
    if start >= end:
        return
    if not shape:
        yield [], [], start
        return
    row = torch.Size(shape[1:]).numel()
    first, last = -(-start // row), end // row  # the full rows
    if first <= last:
        for part_start, part_end in ((start, first * row), (last * row, end)):
            if part_start == last * row and first < last:
                yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]], first * row
            yield from _within(shape, row, part_start, part_end)
    else:
        yield from _within(shape, row, start, end)


def _within(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Yields the boxes of a part of one row."""
    at = start // row
    for offsets, sizes, first in boxes(shape[1:], start - at * row, end - at * row):
        yield [at, *offsets], [1, *sizes], first + at * row
