"""Infers a layout from the parameters alone: plain tensors, and DTensors by their placements."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distopt.layout.base import ShardLayout
from distopt.layout.foreign import refuse_foreign
from distopt.layout.places import Segment
from distopt.layout.replicas import Groups, positions, summing_groups
from distopt.layout.tensors import local, local_parts, same, trained
from distopt.layout.wrapped import unwrap_optimizer


def infer_layout(params: Iterable[Tensor]) -> ShardLayout:
    """Infers the layout of parameters: plain tensors are full on every rank, DTensors are laid out as placed.

    For DDP, FSDP2, HSDP, tensor parallelism and expert parallelism, also mixed: of a parameter that is replicated where
    others are sharded, one replica is counted. Where meshes are not axes of one (`summing_groups`), the first call may
    make a process group, so that every rank has to make it.

    Raises:
        ValueError: For partial placements, for meshes of which none has full copies of all parameters, and for
            parameters that are sharded in ways that no placement says (`refuse_foreign`).
    """
    params = list(params)
    refuse_foreign(params)
    groups = summing_groups(params)
    device = params[0].device if params else torch.device("cpu")
    return ShardLayout(
        segments={p: (Segment(i, 0, local(p).numel()),) for i, p in enumerate(params)},
        params=tuple(params),
        device=device,
        wire=_wire(params, device),
        groups=tuple(groups.values()),
        counted=_counted(params, groups),
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


def _counted(params: Sequence[Tensor], groups: Groups) -> tuple[bool, ...]:
    """Returns for each parameter whether this rank's replica is the first one of each group."""
    firsts = [[index == 0 for index, _ in positions(params, ranks)] for ranks in groups]
    return tuple(map(all, zip(*firsts))) if groups else (True,) * len(params)


def _wire(params: Sequence[Tensor], device: torch.device) -> torch.device | None:
    """Returns the device of the meshes, where FSDP2 keeps the shards on the host (its `CPUOffloadPolicy`)."""
    types = {p.device_mesh.device_type for p in params if hasattr(p, "device_mesh")}
    return torch.device(types.pop()) if types - {device.type} else None
