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
        ValueError: If dimensions other than the first are sharded: tensor parallelism.
    """
    if param.ndim == 0 or not hasattr(param, "placements"):
        return torch.arange(param.numel(), device=param.device).view(param.shape)
    from torch.distributed.tensor import Shard, distribute_tensor

    if any(placement.is_shard() and type(placement) is not Shard for placement in param.placements) or any(
        placement.is_shard() and placement.dim != 0 for placement in param.placements
    ):
        raise ValueError(f"a parameter with placements {param.placements} is sharded within rows: use DDP or FSDP2")
    rows = torch.arange(param.shape[0], device=param.device)
    # src_data_rank=None: every rank takes its part of its own tensor.
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    own = distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local()
    width = param.numel() // max(1, param.shape[0])
    within = torch.arange(width, device=param.device).view(param.shape[1:])
    return own.view(-1, *[1] * (param.ndim - 1)) * width + within
