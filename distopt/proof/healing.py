"""Healing of replicas that have drifted apart, from the majority of the ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout import ShardLayout, layout_of, local, unwrap_optimizer
from distopt.proof.claims import Claims


class Drift(ValueError):
    """Ranks differ in what they have.

    Attributes:
        ranks: The ranks that took part in the proof.
        own: The claims of this rank.
        tables: The columns of every rank, summed over their groups: shape [ranks, columns, num_layers].
    """

    def __init__(self, message: str, ranks: tuple[int, ...], own: Claims, tables: Tensor) -> None:
        super().__init__(message)
        self.ranks, self.own, self.tables = ranks, own, tables


@torch.no_grad()
def heal(optimizer: torch.optim.Optimizer, drift: Drift, group: dist.ProcessGroup | None = None) -> str | None:
    """Gives the weights and the state of the majority to the ranks that differ. Every rank must call it.

    Only the parameters in which ranks differ are sent. The state is healed where it has replicas (DDP, HSDP); under
    ZeRO-1 each part of it is on one rank.

    Args:
        optimizer: The optimizer that was proved.
        drift: What the proof has found, the same on every rank.
        group: The ranks that train together; None for all.

    Returns:
        A line that names the parameters and the ranks that were healed; None, and nothing is changed, where there is no
        majority, or ranks differ in something else than weights and state.
    """
    optimizer = unwrap_optimizer(optimizer)
    layout: ShardLayout = getattr(optimizer, "layout", None) or layout_of(optimizer)
    good = _majorities(drift)
    if good is None or layout.flat:
        return None
    lines = []
    for layer, positions in good.items():
        right = [drift.ranks[position] for position in positions]
        param = layout.params[layer]
        values = [param]
        if type(layout) is ShardLayout:  # one owner for each parameter, the parameter itself
            state: dict[str, Any] = optimizer.state.get(param, {})
            values += [value for _, value in sorted(state.items()) if isinstance(value, Tensor)]
        for each in _replica_groups(param, group):
            for value in values:
                _broadcast(local(value.detach()), right, each)
        healed = ", ".join(str(rank) for rank in drift.ranks if rank not in right)
        lines.append(f"{drift.own.layers[layer][0]} on rank {healed} from rank {right[0]}")
    return f"replicas had drifted apart and were healed: {'; '.join(lines)}"


def _majorities(drift: Drift) -> dict[int, list[int]] | None:
    """Returns, for each parameter in which ranks differ, the positions of the ranks that have what most of them have.

    None unless it exists for all of them.
    """
    everywhere = range(len(drift.ranks))
    good: dict[int, list[int]] = {}
    for column, values in zip(drift.own.columns, drift.tables.unbind(1)):
        if column.zero and values.any():
            return None
        for layer in (values != values[0]).any(0).nonzero().flatten().tolist():
            (usual, count), *_ = Counter(values[:, layer].tolist()).most_common(1)
            if not column.what.startswith(("weights", "the state's")) or 2 * count <= len(values):
                return None
            good[layer] = [i for i in good.get(layer, everywhere) if values[i, layer] == usual]
    return good if good and all(good.values()) else None


def _replica_groups(param: Tensor, group: dist.ProcessGroup | None) -> list[dist.ProcessGroup | None]:
    """Returns the groups of ranks that have the same shard of a parameter."""
    if not hasattr(param, "placements"):
        return [group]
    dtensor: Any = param
    replicated = [axis for axis, placement in enumerate(dtensor.placements) if placement.is_replicate()]
    return [dtensor.device_mesh.get_group(axis) for axis in replicated]


def _broadcast(value: Tensor, right: list[int], group: dist.ProcessGroup | None) -> None:
    """Sends a tensor from the first rank of a group that is right to the others."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    source = next(rank for rank in members if rank in right)
    sent = value.contiguous()
    dist.broadcast(sent, source, group=group)
    if sent is not value:
        value.copy_(sent)
