"""Replicas: which ranks have a full copy of a parameter together, and over which groups sums of shards are taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

Ranks = tuple[int, ...]
Groups = dict[Ranks, dist.ProcessGroup]


def sharding_groups(param: Tensor) -> Groups:
    """Returns the process groups of the mesh axes of more than one rank along which a parameter is sharded, by ranks.

    Not by name: torch 2.13 caches its results for one mesh and reuses them for every equal one, so that the parameters
    of a process that has made such a mesh before may be on either.

    Raises:
        ValueError: For partial placements.
    """
    placements = getattr(param, "placements", ())
    if any(p.is_partial() for p in placements):
        raise ValueError(f"a parameter has placements {placements}: partial sums have no norm; redistribute it first")
    mesh: Any = getattr(param, "device_mesh", None)
    groups = [mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    return {tuple(dist.get_process_group_ranks(group)): group for group in groups}


def summing_groups(params: Sequence[Tensor]) -> Groups:
    """Returns the groups over which a sum, one after the other, is one over all shards of each of these parameters.

    Those of the mesh axes that shard, if all are axes of one mesh. Else a single one, the smallest group of an axis or
    of a mesh that has a whole number of replicas of each parameter: experts that are sharded along `ep` and then by
    FSDP2 over the other ranks, beside layers that FSDP2 shards over all of them.

    Raises:
        ValueError: If there is no such group.
    """
    params = _distinct(params)
    groups: Groups = {}
    for param in params:
        groups = sharding_groups(param) | groups
    meshes = [p.device_mesh for p in params if hasattr(p, "device_mesh")]
    if len(groups) < 2 or any(_axes(mesh) >= groups.keys() for mesh in meshes):
        return groups
    found = {tuple(sorted(mesh.mesh.flatten().tolist())): None for mesh in meshes} | groups
    for ranks in sorted(found, key=len):
        if all(_whole_replicas(param, ranks) for param in params):
            return {ranks: found[ranks] or group_of(ranks)}
    raise ValueError(
        f"parameters are sharded on meshes that are not axes of one, {sorted({str(mesh) for mesh in meshes})}, and no "
        "axis or mesh among them has full copies of all of them: give the mesh of each parameter all ranks that train "
        "it, and replicate it along the axes that do not shard it (Replicate(), as HSDP does)"
    )


def replicas(param: Tensor, ranks: Sequence[int]) -> list[Ranks]:
    """Divides ranks into sets that have a full copy of a parameter together; the first rank is in the first set.

    A rank that is not in the parameter's mesh, or all ranks for a plain tensor, are sets of their own.
    """
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None:
        return [(rank,) for rank in ranks]
    sharding, replicating = _axes_by_use(param)
    among = set(ranks)
    rows = mesh.mesh.permute(*replicating, *sharding).reshape(-1, _replica_size(param)).tolist()
    found = [own for row in rows if (own := tuple(rank for rank in row if rank in among))]
    there = {rank for own in found for rank in own}
    found += [(rank,) for rank in ranks if rank not in there]
    return sorted(found, key=lambda own: min(map(ranks.index, own)))


def positions(params: Iterable[Tensor], ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each parameter the index of this rank's replica among those in a group, and their number."""
    known: dict[Any, tuple[int, int]] = {}
    found = []
    for param in params:
        if (key := _key(param)) not in known:
            sets = replicas(param, ranks)
            known[key] = next(i for i, own in enumerate(sets) if dist.get_rank() in own), len(sets)
        found.append(known[key])
    return found


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Returns the process group of these ranks. Collective among them the first time, unless they are all."""
    world = dist.group.WORLD
    assert world is not None
    # No mesh._flatten: after it torch 2.13 gathers a tensor that two axes shard along one dimension wrongly.
    return world if len(ranks) == dist.get_world_size() else _made(world, tuple(ranks))


@functools.lru_cache(maxsize=64)
def _made(_: dist.ProcessGroup, ranks: Ranks) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _key(param: Tensor) -> Any:
    return id(getattr(param, "device_mesh", None)), getattr(param, "placements", ())


def _distinct(params: Iterable[Tensor]) -> list[Any]:
    """Returns one parameter for each mesh and placements."""
    return list({_key(param): param for param in params}.values())


def _axes(mesh: Any) -> set[Ranks]:
    return {tuple(dist.get_process_group_ranks(mesh.get_group(i))) for i in range(mesh.ndim)}


def _axes_by_use(param: Any) -> tuple[list[int], list[int]]:
    """Returns the axes of a parameter's mesh that shard it, and those that replicate it."""
    replicating = [axis for axis, placement in enumerate(param.placements) if placement.is_replicate()]
    return [axis for axis in range(param.device_mesh.ndim) if axis not in replicating], replicating


def _replica_size(param: Any) -> int:
    """Returns how many ranks have a full copy of a parameter together."""
    return math.prod(param.device_mesh.size(axis) for axis in _axes_by_use(param)[0]) if _placed(param) else 1


def _placed(param: Any) -> bool:
    return hasattr(param, "placements")


def _whole_replicas(param: Tensor, ranks: Ranks) -> bool:
    """Whether ranks, this one among them, have a whole number of copies of a parameter."""
    size = _replica_size(param)
    return all(len(own) == size for own in replicas(param, ranks))
