"""The position of each local element in the full parameter, for values that depend on it and not on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def global_indices(param: Tensor) -> Tensor:
    """Returns the index of each local element in the flattened full parameter.

    Nothing is sent, and no rank has an index tensor of the full parameter.

    Returns:
        int64, of the local shape and on the device of the parameter.

    Raises:
        ValueError: If a dimension is sharded in strides: FSDP2 over tensor parallelism.
    """
    if param.ndim == 0 or not hasattr(param, "placements"):
        return torch.arange(param.numel(), device=param.device).view(param.shape)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if any(placement.is_shard() and type(placement) is not Shard for placement in param.placements):
        raise ValueError(f"a parameter with placements {param.placements} is sharded in strides: use DDP or FSDP2")
    index = torch.zeros([], dtype=torch.int64, device=param.device)
    for dim, length in enumerate(param.shape):
        along = [Shard(0) if p.is_shard(dim) else Replicate() for p in param.placements]
        # src_data_rank=None: every rank takes its part of its own tensor.
        own = distribute_tensor(
            torch.arange(length, device=param.device),
            param.device_mesh,  # type: ignore[attr-defined]
            along,
            src_data_rank=None,
        )
        index = index.unsqueeze(-1) * length + own.to_local()
    return index
