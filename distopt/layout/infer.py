"""The layout that parameters themselves tell: plain tensors, and DTensors by their placements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import Segment, ShardLayout, local, trained
from distopt.layout.foreign import refuse_foreign
from distopt.layout.wrappers import optimizer_chain


def infer_layout(params: Iterable[Tensor]) -> ShardLayout:
    """The layout that the parameters themselves tell: plain ones are whole on every rank, DTensors lie as placed.

    DDP, FSDP2, HSDP and tensor parallelism, mixed too: a parameter that is replicated along an axis that cuts others
    is counted once. Raises ValueError for partial placements, for meshes that are not axes of one, and for parameters
    that are sharded in ways that they do not tell (`refuse_foreign`).
    """
    params = list(params)
    refuse_foreign(params)
    axes = [sharding_groups(p) for p in params]
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for held in axes:
        groups = held | groups
    _check_one_mesh(params, groups)
    return ShardLayout(
        segments={p: (Segment(i, 0, local(p).numel()),) for i, p in enumerate(params)},
        params=tuple(params),
        device=params[0].device if params else torch.device("cpu"),
        groups=tuple(groups.values()),
        counted=tuple(all(dist.get_rank(g) == 0 for ranks, g in groups.items() if ranks not in held) for held in axes),
    )


def layout_of(optimizer: torch.optim.Optimizer) -> ShardLayout:
    """Where the gradients of an optimizer's layers lie: as its own layout says if it has one, else its parameters.

    Finds the layout also inside of what Accelerate and DeepSpeed put around an optimizer. Raises TypeError for what is
    no optimizer.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected an optimizer, which knows how its parameters are sharded, got {type(optimizer).__name__}: call "
            "distopt.clip_grad_norm_(optimizer, max_norm), or torch.nn.utils.clip_grad_norm_ for parameters without "
            "ZeRO-1 or DeepSpeed"
        )
    for inner in optimizer_chain(optimizer):
        if hasattr(inner, "layout"):
            return inner.layout.gradients or inner.layout
    return infer_layout(trained(p for group in optimizer.param_groups for p in group["params"]))


def sharding_groups(param: Tensor) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """The groups of the mesh axes of more than one rank along which a parameter is cut, by their ranks.

    Not by name: torch 2.13 keeps what it has found out for one mesh for all that are equal to it, so that parameters of
    a process that has made such a mesh before lie on the one or on the other.
    """
    placements = getattr(param, "placements", ())
    if any(p.is_partial() for p in placements):
        raise ValueError(f"a parameter has placements {placements}: partial sums have no norm; redistribute it first")
    mesh: Any = getattr(param, "device_mesh", None)
    cut = [mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    return {tuple(dist.get_process_group_ranks(group)): group for group in cut}


def _check_one_mesh(params: Sequence[Tensor], groups: Mapping[tuple[int, ...], dist.ProcessGroup]) -> None:
    """Sums over several axes count each element once only if the axes are those of one mesh."""
    if len(groups) < 2:
        return
    mesh = max((p.device_mesh for p in params if hasattr(p, "device_mesh")), key=lambda mesh: mesh.ndim)
    if not groups.keys() <= {tuple(dist.get_process_group_ranks(mesh.get_group(i))) for i in range(mesh.ndim)}:
        meshes = {str(p.device_mesh) for p in params if hasattr(p, "device_mesh")}
        raise ValueError(
            f"parameters are sharded on meshes that are not axes of one: {sorted(meshes)}; build one mesh, and where "
            "it has an axis for experts alone, replicate the other parameters along that (as HSDP does)"
        )
