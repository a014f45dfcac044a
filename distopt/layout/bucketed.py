"""ZeRO-1 on buckets: each rank updates its range of every bucket and sends it to the others, nothing is packed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import Placement
from distopt.layout.bucket import Bucket, make_buckets
from distopt.layout.bucket_gradients import BucketGradients
from distopt.layout.host_range import HostRange
from distopt.layout.infer import infer_layout
from distopt.layout.messages import others, over_gloo, receive, send
from distopt.layout.param_sync import ParamSync
from distopt.layout.places import Segment
from distopt.layout.range_shard import Range, RangeShard
from distopt.layout.zero1 import Zero1Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class BucketLayout(Zero1Layout):
    """The elements of each parameter that are in this rank's ranges of the buckets.

    For models whose parameters are distopt's to move (`distopt.engine.Zero1`); `Zero1Layout`, sharded by the rows of
    each parameter, is for DDP models of others. The state is a `RangeShard` of the parameter's own shape.

    Attributes:
        exchange: Exchanges the gradients.
        buckets: The buckets, in the order of the backward pass.
    """

    exchange: BucketGradients = None  # type: ignore[assignment]
    buckets: tuple[Bucket, ...] = ()

    def placement(self, param: Tensor, per: int = 1) -> Placement | None:
        (segment,) = self.segments[param]
        return self.mesh, (Range(segment.offset // per, segment.numel // per),)

    def cuts(self, param: Tensor, block: int) -> bool:
        return any(bucket.cuts(param, block) for bucket in self.buckets)

    def check_copyable(self) -> None:
        raise ValueError(
            "the optimizer is bound to buffers of the model, which a copy would not have: build another model by the "
            "engine, make an optimizer for it and load this one's checkpoint (distopt.load_checkpoint)"
        )

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Self:
        self.check_copyable()
        return self

    def _sharded(self, param: Tensor, rows: Tensor) -> Tensor:
        (segment,) = self.segments[param]
        return RangeShard(rows, param.shape, Range(segment.offset, segment.numel), self.mesh)


@dataclass(frozen=True, eq=False)
class HostBucketLayout(BucketLayout):
    """As `BucketLayout`, where the host has this rank's ranges, their gradients and their state, and updates them."""

    @functools.cached_property
    def _hosts(self) -> dict[Tensor, tuple[HostRange, int]]:
        """For each parameter that this rank has elements of: their host range, and the first of them in it."""
        return {
            p: (bucket.host, at)
            for bucket in self.buckets
            if bucket.host is not None
            for p, (at, _) in bucket.ranges_in_own.items()
        }

    def state_device(self, param: Tensor) -> torch.device:
        return self.device

    def split_local(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """Returns this rank's elements on the host for weights and gradients; those of other tensors where they are."""
        host, at = self._hosts.get(param, (None, 0))
        if host is None or (found := host.counterpart(tensor)) is None:
            return super().split_local(param, tensor)
        if found is host.weights:
            host.fetch_weights(param)
        return [found.narrow(0, at, self.segments[param][0].numel)]

    def grad_shards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        # Every step asks for gradients anew, and keeps its views of the weights.
        for p in params:
            if p in self._hosts:
                self._hosts[p][0].fetch_weights(p)
        return super().grad_shards(params, grads)


class BucketSync(ParamSync):
    """All-gathers each bucket in place, last ones first: a forward pass needs those.

    Args:
        buckets: The buckets, in the order of the backward pass.
        group: The ranks that share the parameters.
        late: Whether `publish` returns while ranges are in flight; those of other ranks are NaN before they arrive.
    """

    def __init__(self, buckets: Sequence[Bucket], group: dist.ProcessGroup, late: bool = False) -> None:
        self._group, self._late = group, late
        self._order = list(reversed(buckets))
        self._in_flight: list[tuple[Bucket, list[dist.Work]]] = []

    def publish(self, params: Sequence[Tensor]) -> None:
        self.wait()
        changed = set(params)
        for bucket in self._order:
            if not changed.isdisjoint(bucket.params):
                if bucket.host is not None:
                    for p in bucket.ranges_in_own.keys() - changed:
                        bucket.host.fetch_weights(p)
                    bucket.host.send_weights()
                if self._group.size() == 1:
                    continue
                if self._late:
                    bucket.poison(bucket.weights)
                self._in_flight.append((bucket, all_gather(bucket, self._group)))
        if not self._late:
            self.wait()

    def wait(self, params: frozenset[Tensor] | None = None) -> None:
        while self._in_flight and (params is None or any(not params.isdisjoint(b.params) for b, _ in self._in_flight)):
            for work in self._in_flight.pop(0)[1]:
                work.wait()


def bucket_layout(
    params: Sequence[Tensor],
    mesh: DeviceMesh,
    *,
    reduce_dtype: torch.dtype | None = None,
    find_unused: bool = False,
    late: bool = False,
    offload: bool = False,
) -> BucketLayout:
    """Moves parameters into buckets, and returns their layout.

    Args:
        params: The parameters to train, with equal values on all ranks or not, in the order of the forward pass.
        mesh: One axis, over the ranks that share them.
        reduce_dtype: The dtype in which gradients are sent; None for their own.
        find_unused: As in `BucketGradients`.
        late: As in `BucketSync`.
        offload: Whether state is kept, and updates are computed, on the host.
    """
    group = mesh.get_group()
    buckets = make_buckets(params, mesh.size(), mesh.get_local_rank(), offload)
    ranges = {p: at for bucket in buckets for p, at in zip(bucket.params, bucket.ranges)}
    device = params[0].device if params else torch.device("cpu")
    return (HostBucketLayout if offload else BucketLayout)(
        segments={p: (Segment(i, *ranges[p], ranges[p].start),) for i, p in enumerate(params)},
        params=tuple(params),
        device=torch.device("cpu") if offload else device,
        wire=device if offload else None,
        groups=(group,) if mesh.size() > 1 else (),
        counted=(True,) * len(params),
        model=infer_layout(params),
        sync=BucketSync(buckets, group, late),
        mesh=mesh,
        exchange=BucketGradients(buckets, group, reduce_dtype, find_unused),
        buckets=tuple(buckets),
    )


def all_gather(bucket: Bucket, group: dist.ProcessGroup) -> list[dist.Work]:
    """Starts sending this rank's range of a bucket's weights to all others, and receiving theirs in place."""
    mine = bucket.weights[bucket.own]
    if not over_gloo(group, mine.device):
        return [dist.all_gather_single(bucket.weights, mine, group=group, async_op=True)]
    # torch 2.13: gloo's all-gather takes four times as long as messages of the same bytes.
    rows = bucket.rows(bucket.weights)
    return [work for other in others(group) for work in (send(mine, other, group), receive(rows[other], other, group))]
