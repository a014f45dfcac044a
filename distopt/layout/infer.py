"""Infers a layout from the parameters alone: plain tensors, and DTensors by their placements."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import ShardLayout
from distopt.layout.foreign import refuse_foreign
from distopt.layout.places import Segment
from distopt.layout.tensors import local, local_parts, same, trained
from distopt.layout.wrapped import unwrap_optimizer


def infer_layout(params: Iterable[Tensor]) -> ShardLayout:
    """Infers the layout of parameters: plain tensors are full on every rank, DTensors are laid out as placed.

    For DDP, FSDP2, HSDP and tensor parallelism, also mixed: a parameter that is replicated along an axis that shards
    others is counted once.

    Raises:
        ValueError: For partial placements, for meshes that are not axes of one, and for parameters that are sharded in
            ways that no placement says (`refuse_foreign`).
    """
    params = list(params)
    refuse_foreign(params)
    axes = _sharding_groups_of_each(params)
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for sharding in {id(own): own for own in axes}.values():
        groups = sharding | groups
    _check_one_mesh(params, groups)
    device = params[0].device if params else torch.device("cpu")
    return ShardLayout(
        segments={p: (Segment(i, 0, local(p).numel()),) for i, p in enumerate(params)},
        params=tuple(params),
        device=device,
        wire=_wire(params, device),
        groups=tuple(groups.values()),
        counted=_counted(axes, groups),
    )


def layout_of(optimizer: torch.optim.Optimizer, params: list[Tensor] | None = None) -> ShardLayout:
    """Returns the layout of an optimizer's gradients: its own layout's if it has one, else its parameters'.

    Also finds the layout inside of the wrappers of Accelerate and DeepSpeed.

    Args:
        optimizer: The optimizer.
        params: Its trained parameters, if they are known.

    Raises:
        TypeError: If this is no optimizer.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected an optimizer, which knows how its parameters are sharded, got {type(optimizer).__name__}: call "
            "distopt.clip_grad_norm_(optimizer, max_norm), or torch.nn.utils.clip_grad_norm_ for parameters without "
            "ZeRO-1 or DeepSpeed"
        )
    optimizer = unwrap_optimizer(optimizer, lambda inner: hasattr(inner, "layout"))
    if hasattr(optimizer, "layout"):
        layout = optimizer.layout
        return layout.gradients or layout
    if params is None:
        params = trained([p for group in optimizer.param_groups for p in group["params"]])
    return _kept_layout(optimizer, params)


# Of optimizers that are not distopt's, which have no place of their own for it.
_layouts: weakref.WeakKeyDictionary[torch.optim.Optimizer, ShardLayout] = weakref.WeakKeyDictionary()


def _kept_layout(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> ShardLayout:
    """Returns the layout that was inferred for an optimizer before; a new one for other parameters or local sizes."""
    layout = _layouts.get(optimizer)
    if layout is None or not _is_of(layout, params):
        layout = _layouts[optimizer] = infer_layout(params)
    return layout


def _is_of(layout: ShardLayout, params: list[Tensor]) -> bool:
    if not same(params, layout.params):
        return False
    return [part.numel for parts in layout.segments.values() for part in parts] == list(
        map(Tensor.numel, local_parts(params))
    )


def sharding_groups(param: Tensor) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Returns the process groups of the mesh axes of more than one rank along which a parameter is sharded, by ranks.

    Not by name: torch 2.13 caches its results for one mesh and reuses them for every equal one, so that the parameters
    of a process that has made such a mesh before may be on either.
    """
    placements = getattr(param, "placements", ())
    if any(p.is_partial() for p in placements):
        raise ValueError(f"a parameter has placements {placements}: partial sums have no norm; redistribute it first")
    mesh: Any = getattr(param, "device_mesh", None)
    groups = [mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    return {tuple(dist.get_process_group_ranks(group)): group for group in groups}


def _sharding_groups_of_each(params: Sequence[Tensor]) -> list[dict[tuple[int, ...], dist.ProcessGroup]]:
    """Returns `sharding_groups` of each parameter, made once for a mesh and placements."""
    known: dict[Any, dict[tuple[int, ...], dist.ProcessGroup]] = {}
    found = []
    for p in params:
        key = id(getattr(p, "device_mesh", None)), getattr(p, "placements", ())
        if key not in known:
            known[key] = sharding_groups(p)
        found.append(known[key])
    return found


def _counted(
    axes: Sequence[Mapping[tuple[int, ...], dist.ProcessGroup]], groups: Mapping[tuple[int, ...], dist.ProcessGroup]
) -> tuple[bool, ...]:
    """Returns for each parameter whether this rank is the first one along the axes that shard only others."""
    found = {
        id(own): all(dist.get_rank(g) == 0 for ranks, g in groups.items() if ranks not in own)
        for own in {id(own): own for own in axes}.values()
    }
    return tuple(found[id(own)] for own in axes)


def _wire(params: Sequence[Tensor], device: torch.device) -> torch.device | None:
    """Returns the device of the meshes, where FSDP2 keeps the shards on the host (its `CPUOffloadPolicy`)."""
    types = {p.device_mesh.device_type for p in params if hasattr(p, "device_mesh")}
    return torch.device(types.pop()) if types - {device.type} else None


def _check_one_mesh(params: Sequence[Tensor], groups: Mapping[tuple[int, ...], dist.ProcessGroup]) -> None:
    """Refuses meshes that are not axes of one: a sum over several axes would count elements more than once."""
    if len(groups) < 2:
        return
    mesh = max((p.device_mesh for p in params if hasattr(p, "device_mesh")), key=lambda mesh: mesh.ndim)
    if not groups.keys() <= {tuple(dist.get_process_group_ranks(mesh.get_group(i))) for i in range(mesh.ndim)}:
        meshes = {str(p.device_mesh) for p in params if hasattr(p, "device_mesh")}
        raise ValueError(
            f"parameters are sharded on meshes that are not axes of one: {sorted(meshes)}; build one mesh, and where "
            "it has an axis for experts alone, replicate the other parameters along that (as HSDP does)"
        )
