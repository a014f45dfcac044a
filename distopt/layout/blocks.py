"""State with an element for each few consecutive elements of a parameter: the codes and scales of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.blocks import block_of
from distopt.kernels.shards import row_of
from distopt.layout.base import ShardLayout
from distopt.layout.range_shard import Range, RangeShard


def blocks_shape(shape: Sequence[int], per: int) -> tuple[int, int]:
    """Returns the full shape of state with an element for each `per` elements of a parameter: a matrix of its rows."""
    return shape[0], row_of(shape) // per


def zeros_per(layout: ShardLayout, param: Tensor, per: int, dtype: torch.dtype) -> Any:
    """Returns zeros of shape `blocks_shape`, sharded as the parameter: by rows, or evenly by columns."""
    shape = blocks_shape(layout.full_shape(param), per)
    numel = layout.state_numel(param) // per
    own, placement = torch.zeros(numel, dtype=dtype, device=layout.state_device(param)), layout.placement(param, per)
    if placement is None:
        return own.view(shape)
    mesh, placements = placement
    if isinstance(placements[0], Range):
        return RangeShard(own, torch.Size(shape), placements[0], mesh)
    from torch.distributed.tensor import DTensor

    columns = shape[1] // math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard(1))
    full: dict[str, Any] = {"shape": torch.Size(shape), "stride": (shape[1], 1)}
    return DTensor.from_local(own.view(-1, columns), mesh, placements, run_check=False, **full)


def check_blocks(layout: ShardLayout, group: Mapping[str, Any]) -> None:
    """Raises ValueError, the same on every rank, if a parameter of a param group is sharded within its blocks."""
    if layout.flat or group.get("state_bits", 32) >= 16:  # `FlatLayout.check_group`
        return
    for p in group["params"]:
        block = block_of(layout.full_shape(p))
        if block and p in layout and layout.cuts(p, block):
            raise ValueError(
                f"state_bits={group['state_bits']}: a parameter of shape {tuple(layout.full_shape(p))} is sharded in "
                f"strides or within blocks of {block} elements of its rows ({getattr(p, 'placements', 'in ranges')}): "
                "shard it along dimension 0, or give its param group state_bits=32"
            )
