"""The last phase of a ZeRO-1 step: every rank sends the rows that it updated, and receives all others.

1. DDP, or its communication hook, exchanges the gradients during the backward pass.
2. Each rank updates its rows of each parameter (`distopt.optim.ShardedOptimizer.step`).
3. `RowSync.publish` sends the updated rows: (N-1)/N of the bytes of the parameters per rank and step. With `units` the
   messages overlap the next forward pass, and each unit's forward pass waits for its own.

Every other layout needs no third phase: it has the neutral `ParamSync`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.layout.messages import over_gloo
from distopt.layout.row_sharding import own_rows, poison_remote_rows, swap, unpack, width

# Elements of one exchange. Two are in flight, so this bounds their scratch memory. Below 32 MB the C library reuses
# the same memory in the next step; above, every page of it would be new, which costs as much as sending it.
_BUCKET = 2**22


class ParamSync:
    """Brings updated parameters to the ranks that have copies of them. This one is neutral: there are no such ranks."""

    def publish(self, params: Sequence[Tensor]) -> None:
        """Sends the updated shards of these parameters to all other ranks, and receives theirs. Collective."""

    def wait(self, params: frozenset[Tensor] | None = None) -> None:
        """Waits until the published shards of these parameters have arrived; None means all parameters."""


class RowSync(ParamSync):
    """All-gathers the rows that each rank owns of the parameters, which are full on every rank.

    Args:
        group: The ranks that share the parameters.
        device: The device of the parameters.
        units: The parameters of each block of the model, in the order of the forward pass. With units `publish` returns
            while rows are in flight, and rows of other ranks are NaN until `wait`, so that a stale read is seen.
            Scratch memory is then as large as the model. Without units `publish` waits, and scratch memory is two
            buckets (none over gloo).
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, units: Sequence[frozenset[Tensor]] = ()) -> None:
        self._group, self._device, self._units = group, device, units
        self._in_flight: list[_Gather] = []

    def publish(self, params: Sequence[Tensor]) -> None:
        """Starts one all-gather per bucket of parameters; over gloo without units, messages that need no buckets."""
        self.wait()
        if self._group.size() == 1:
            return
        if not self._units and over_gloo(self._group, self._device):
            swap([p.detach() for p in params], self._group)
            return
        for bucket in self._buckets(params):
            if not self._units and len(self._in_flight) > 1:  # one is unpacked while the next is in flight
                self._in_flight.pop(0).finish()
            self._in_flight.append(_Gather(self._group, bucket))
        if self._units:
            for gather in self._in_flight:
                gather.poison()
        else:
            self.wait()

    def wait(self, params: frozenset[Tensor] | None = None) -> None:
        while self._in_flight and (params is None or any(gather.contains(params) for gather in self._in_flight)):
            self._in_flight.pop(0).finish()

    def _buckets(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yields the parameters of each all-gather; those that units share come with the first of these units."""
        left = dict.fromkeys(params)
        for unit in self._units or [frozenset(params)]:
            yield from _buckets([p for p in params if p in unit and p in left])
            left = {p: None for p in left if p not in unit}


def overlapped(group: dist.ProcessGroup, device: torch.device, model: nn.Module, units: Sequence[nn.Module]) -> RowSync:
    """Makes a `RowSync` whose messages overlap the forward pass, and registers the hooks of the model that wait.

    Args:
        group: The ranks that share the parameters.
        device: The device of the parameters.
        model: The model; its forward pass waits for the parameters outside of the units, its state dict for all.
        units: Modules of the model in the order of its forward pass. None of them: nothing overlaps.
    """
    owned = unit_params(model, units)
    sync = RowSync(group, device, owned)
    wait_before_use(sync, model, units)
    return sync


def unit_params(model: nn.Module, units: Sequence[nn.Module]) -> list[frozenset[Tensor]]:
    """Returns the parameters outside of the units of a model, and those of each unit; nothing without units."""
    inside = [frozenset(unit.parameters()) for unit in units]
    return [frozenset(model.parameters()).difference(*inside), *inside] if units else []


def wait_before_use(sync: ParamSync, model: nn.Module, units: Sequence[nn.Module]) -> None:
    """Registers the hooks by which the forward pass of each unit waits for its parameters, and a state dict for all."""
    for unit, params in zip((model, *units), unit_params(model, units)):
        unit.register_forward_pre_hook(lambda module, args, params=params: sync.wait(params))
    for module in model.modules() if units else ():
        module.register_state_dict_pre_hook(lambda *_: sync.wait())
        module.register_load_state_dict_pre_hook(lambda *_: sync.wait())  # or rows would arrive after the load


class _Gather:
    """An all-gather of the rows of some parameters that is in flight."""

    def __init__(self, group: dist.ProcessGroup, params: list[Tensor]) -> None:
        self._world, self._rank = group.size(), group.rank()
        self._keys, self._params = params, [p.detach() for p in params]
        widths = [width(p, self._world) for p in params]
        # A rank that has fewer rows sends uninitialised memory in their place, which nobody reads.
        self._all = params[0].new_empty(self._world, sum(widths))
        rows = [own_rows(p, self._world, self._rank) for p in self._params]
        mine = self._all[self._rank].split(widths)
        torch._foreach_copy_([to[: row.numel()] for to, row in zip(mine, rows)], rows)
        self._works = all_gather(self._all, self._rank, group)

    def contains(self, params: frozenset[Tensor]) -> bool:
        return not params.isdisjoint(self._keys)

    def poison(self) -> None:
        """Fills the rows of other ranks, which are those of the step before, with NaN."""
        poison_remote_rows(self._params, self._world, self._rank)

    def finish(self) -> None:
        for work in self._works:
            work.wait()
        unpack(self._params, self._all[: self._rank], self._world)
        unpack(self._params, self._all[self._rank + 1 :], self._world, self._rank + 1)


def all_gather(matrix: Tensor, rank: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Starts sending this rank's row of a matrix [ranks, width] to all others, and receiving theirs.

    Returns:
        The work to wait for.
    """
    if over_gloo(group, matrix.device):
        # torch 2.13: its all-gather takes four times as long as these broadcasts of the same bytes.
        return [dist.broadcast(row, group=group, group_src=i, async_op=True) for i, row in enumerate(matrix)]
    return [dist.all_gather_single(matrix.view(-1), matrix[rank], group=group, async_op=True)]


def _buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields runs of parameters of one dtype, of at most _BUCKET elements or of one parameter."""
    for dtype in dict.fromkeys(p.dtype for p in params):
        bucket: list[Tensor] = []
        numel = 0
        for p in (p for p in params if p.dtype == dtype):
            numel += p.numel()
            if bucket and numel > _BUCKET:
                yield bucket
                bucket, numel = [], p.numel()
            bucket.append(p)
        yield bucket
