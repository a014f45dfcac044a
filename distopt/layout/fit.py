"""Lays out state that was loaded, or made for another layout, as a layout has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distopt.kernels.rules import Slot
from distopt.layout.base import ShardLayout
from distopt.layout.range_shard import Range, RangeShard
from distopt.layout.tensors import wide


def fit(layout: ShardLayout, param: Tensor, value: Tensor, name: str, slot: Slot | None = None) -> Tensor:
    """Returns a state buffer with the shape, dtype, device and placements that the layout has for its parameter.

    A full tensor is sharded to this rank's part. A DTensor of another mesh or other placements is gathered first, so
    that every rank has to call it.

    Args:
        layout: The layout of the parameter.
        param: A tensor that the optimizer updates.
        value: The buffer, full or as a DTensor.
        name: The name of the buffer, for the error.
        slot: Its shape and placement, if it is not like its parameter.

    Raises:
        ValueError: For a tensor of another full shape.
    """
    check_shape(param, value, name, slot)
    mesh, to = (
        getattr(value, "device_mesh", None),
        None if slot and slot.replicated else layout.placement(param, slot.per if slot else 1),
    )
    now = None if mesh is None else (mesh, tuple(value.placements))  # type: ignore[attr-defined]
    if now != to:
        full = value if now is None else value.full_tensor()  # type: ignore[attr-defined]
        value = full if to is None else _part(full, *to)
    return value.to(layout.state_device(param), (slot and slot.dtype) or wide(param.dtype))


def check_shape(param: Tensor, value: Any, name: str, slot: Slot | None = None) -> None:
    """Raises ValueError unless a state buffer is a tensor of its slot's full shape, or else its parameter's."""
    wanted = tuple(slot.shape if slot else param.shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"the state {name} is a {type(value).__name__}, not a tensor")
    if value.shape != wanted:
        like = "" if wanted == param.shape else f", of which it has to be {wanted}"
        raise ValueError(
            f"the state {name} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}{like}: load a state "
            "that was saved with parameters of the same shapes, or delete the parameter's entry to start it from zeros"
        )


def _part(full: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Returns this rank's part of a tensor that every rank has, in memory of its own."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(placements[0], Range):
        return RangeShard.of(full, placements[0], mesh)
    part = distribute_tensor(full, mesh, placements, src_data_rank=None)
    mine = part.to_local().clone()  # a view would keep the full tensor
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=part.shape, stride=part.stride())
