"""Full matrices at their owners: one all-to-all brings the shards there, and another one brings the results back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import ShardLayout
from distopt.layout.matrices import Cost, Held, Matrix, buckets, matrices, with_owners
from distopt.layout.region import Region, regions
from distopt.layout.replicas import group_of


class Move(NamedTuple):
    """Elements that one rank sends to another: a region of the matrix with this index in a bucket."""

    matrix: int
    region: Region
    source: int
    target: int

    @property
    def order(self) -> tuple[object, ...]:
        """The position in a message, the same at both of its ends."""
        return self.matrix, self.region.start


class AllToAll:
    """An exchange whose messages have the same sizes in every step.

    Args:
        moves: All of them, or those of this rank, some of which may stay where they are.
        group: The ranks; None for this one alone.
        device: The device that the group communicates from.
    """

    def __init__(self, moves: Sequence[Move], group: dist.ProcessGroup | None, device: torch.device) -> None:
        rank, world = (group.rank(), group.size()) if group else (0, 1)
        self._device = device
        # Where nothing travels, on any rank, nobody calls the collective.
        self._group = group if any(move.source != move.target for move in moves) else None
        self.sends = sorted((m for m in moves if m.source == rank), key=lambda m: (m.target, m.order))
        self.receives = sorted((m for m in moves if m.target == rank), key=lambda m: (m.source, m.order))
        self._sent = [sum(m.region.numel for m in self.sends if m.target == other) for other in range(world)]
        self._received = [sum(m.region.numel for m in self.receives if m.source == other) for other in range(world)]

    def start(self, views: Sequence[Tensor | None], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        """Starts sending.

        Args:
            views: The elements of each of `sends`; None sends nan.
            dtype: The dtype in which they travel.

        Returns:
            A function that waits, and returns the elements of each of `receives`.
        """
        outgoing = torch.empty(sum(self._sent), dtype=dtype, device=self._device)
        places = _divided(outgoing, self.sends)
        if any(view is None for view in views):
            outgoing.fill_(math.nan)
        filled = [(place, view) for place, view in zip(places, views) if view is not None]
        if filled:
            torch._foreach_copy_([place for place, _ in filled], [view for _, view in filled])
        if self._group is None:
            return lambda: places
        incoming = torch.empty(sum(self._received), dtype=dtype, device=self._device)
        work = dist.all_to_all_single(incoming, outgoing, self._received, self._sent, group=self._group, async_op=True)

        def arrived() -> list[Tensor]:
            work.wait()
            return _divided(incoming, self.receives)

        return arrived


class MatrixExchange:
    """The ways of some matrices from the ranks that have shards of them to their owners, and back.

    Every rank sends and receives the same amounts in every step, whatever gradients there are: a shard without one
    travels as nan.

    Args:
        bucket: The matrices, with their owners.
        held: By rank, the regions of each layer.
        group: The ranks that share the work; None for this one alone.
        device: The device that the group communicates from, and on which matrices are computed.

    Attributes:
        bucket: The matrices.
        layers: The indices of their layers.
        owned: The indices in the bucket of those that this rank owns.

    Raises:
        ValueError: If the shards of the ranks do not make up a matrix.
    """

    def __init__(
        self, bucket: Sequence[Matrix], held: Sequence[Held], group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self.bucket, self._device = list(bucket), device
        rank = group.rank() if group else 0
        self.layers = list(dict.fromkeys(m.layer for m in bucket))
        self.owned = [i for i, m in enumerate(bucket) if m.owner == rank]
        there, back = [], []
        for i, m in enumerate(bucket):
            moves = list(_shards_of(i, m, held))
            there += _once(m, moves)
            back += [move._replace(source=move.target, target=move.source) for move in moves]
        self._there, self._back = AllToAll(there, group, device), AllToAll(back, group, device)

    def gather(self, shards: Mapping[int, Tensor], dtype: torch.dtype) -> Callable[[], dict[int, Tensor]]:
        """Starts the way to the owners.

        Args:
            shards: By layer, the local tensors; layers without a gradient are missing.
            dtype: The dtype in which they travel, and of the matrices.

        Returns:
            A function that waits, and returns the matrices of this rank by their indices in the bucket.
        """
        views = [self._local(move, shards) for move in self._there.sends]
        arrived = self._there.start(views, dtype)

        def full() -> dict[int, Tensor]:
            found = {
                i: torch.empty(self.bucket[i].rows, self.bucket[i].columns, dtype=dtype, device=self._device)
                for i in self.owned
            }
            views = [move.region.of_full(found[move.matrix]) for move in self._there.receives]
            if views:
                torch._foreach_copy_(views, [v.view(to.shape) for v, to in zip(arrived(), views)])
            else:
                arrived()
            return found

        return full

    def scatter(self, results: Mapping[int, Tensor], dtype: torch.dtype) -> Callable[[Mapping[int, Tensor]], None]:
        """Starts the way back.

        Args:
            results: The contiguous matrices that this rank owns, by their indices in the bucket.
            dtype: The dtype in which they travel.

        Returns:
            A function that waits, and fills the local tensors of the layers that it is given.
        """
        arrived = self._back.start([move.region.of_full(results[move.matrix]) for move in self._back.sends], dtype)

        def fill(shards: Mapping[int, Tensor]) -> None:
            pairs = [
                (to, values.view(to.shape))
                for values, move in zip(arrived(), self._back.receives)
                if (to := self._local(move, shards)) is not None
            ]
            if pairs:
                torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])

        return fill

    def _local(self, move: Move, shards: Mapping[int, Tensor]) -> Tensor | None:
        shard = shards.get(self.bucket[move.matrix].layer)
        return None if shard is None else move.region.of_local(shard)


def exchanges(layout: ShardLayout, layers: Sequence[int], limit: int, cost: Cost) -> list[MatrixExchange]:
    """Makes the exchanges of some layers, in the order in which every rank has to use them.

    Collective, once: the ranks of a group tell each other what they have.

    Args:
        layout: The layout.
        layers: The layers, which are matrices or stacks of them; the same on every rank.
        limit: The elements of matrices that a rank sends or receives at most in one exchange.
        cost: The work for a matrix.
    """
    mine = _held(layout, set(layers))
    device = layout.wire or layout.device
    by_group: dict[tuple[int, ...], list[int]] = {}
    for layer in layers:
        by_group.setdefault(layout.sharers(layout.params[layer]), []).append(layer)
    made = []
    for ranks, members in sorted(by_group.items()):
        if ranks and dist.get_rank() not in ranks:
            continue
        group = group_of(ranks) if len(ranks) > 1 else None
        held: list[Held] = [mine] * (group.size() if group else 1)
        if group:
            dist.all_gather_object(held, {layer: mine[layer] for layer in members if layer in mine}, group=group)
        found = [m for layer in members for m in matrices(layer, tuple(layout.full_shape(layout.params[layer])))]
        owned = with_owners([m for m in found if m.numel], held, cost)
        made += [MatrixExchange(bucket, held, group, device) for bucket in buckets(owned, held, limit, cost)]
    return made


def _held(layout: ShardLayout, layers: set[int]) -> dict[int, list[Region]]:
    found: dict[int, list[Region]] = {}
    for param, segments in layout.segments.items():
        if not any(segment.layer in layers for segment in segments):
            continue
        for segment, place in zip(segments, layout.places(param)):
            if segment.layer in layers:
                shape = layout.full_shape(layout.params[segment.layer])
                found.setdefault(segment.layer, []).extend(regions(place, shape))
    return found


def _shards_of(index: int, m: Matrix, held: Sequence[Held]) -> Iterator[Move]:
    """Yields what each rank has of a matrix, on its way to the owner."""
    for rank, regions_of in enumerate(held):
        for region in regions_of.get(m.layer, ()):
            part = m.part(region)
            if part.numel:
                yield Move(index, part, rank, m.owner)


def _once(m: Matrix, moves: Sequence[Move]) -> list[Move]:
    """Returns one of the equal copies of each shard: that of the owner, or of the replica that the owner is in."""
    copies: dict[object, list[Move]] = {}
    for move in moves:
        copies.setdefault(move.region.box, []).append(move)
    replica = next((i for same in copies.values() for i, move in enumerate(same) if move.source == m.owner), 0)
    chosen = [same[replica % len(same)] for same in copies.values()]
    if (found := sum(move.region.numel for move in chosen)) != m.numel:
        raise ValueError(
            f"the shards of matrix {m.number} of layer {m.layer} on the ranks that share it have {found} elements, the "
            f"matrix {m.numel}: bind the layout that the engine made (distopt.layout)"
        )
    return chosen


def _divided(buffer: Tensor, moves: Sequence[Move]) -> list[Tensor]:
    pieces = buffer.split([move.region.numel for move in moves]) if moves else ()
    return [piece.view(move.region.size) for piece, move in zip(pieces, moves)]
