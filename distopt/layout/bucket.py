"""Flat buffers of weights and gradients, of which each rank owns an equal range of whole rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout.host_range import HostRange
from distopt.layout.range_shard import Range

# Elements of a bucket: at least 32 MB of float32, and 256 kB for each rank, as messages of a ring get smaller with more
# ranks. Of a bucket at most 1/8 is padding.
_NUMEL, _SHARE = 2**23, 2**16
_BLOCK = 512  # elements of a row that a norm adds up at once (distopt.kernels.norms)
_LEAST = 64  # elements, lest tensors of short rows begin anywhere
FRESH = 2**17  # elements of gradients that a pass collects before they are copied into their bucket


class Plan(NamedTuple):
    """Where parameters lie in a bucket.

    Attributes:
        members: The indices of the parameters.
        offsets: The first element of each in the buffer.
        share: The elements that each rank owns: a number of whole rows.
    """

    members: list[int]
    offsets: list[int]
    share: int


def plan_buckets(shapes: Sequence[Sequence[int]], world: int, kinds: Sequence[Any] = ()) -> list[Plan]:
    """Divides parameters into buckets, in the order in which a backward pass completes these.

    Parameters of one bucket have rows of one length, lest a range end within a row: norms are then the same bits at
    every number of ranks, and rules that work on rows see whole ones.

    Args:
        shapes: The shapes of the parameters, in the order of the forward pass.
        world: The number of ranks.
        kinds: For each parameter what those of one bucket must have in common besides: dtype and device.
    """
    size = max(_NUMEL, _SHARE * world)
    closed: list[tuple[int, list[int]]] = []  # the grain, the members
    filling: dict[Any, tuple[int, list[int]]] = {}
    for i in reversed(range(len(shapes))):
        grain = _grain(shapes[i], size // (8 * world))
        kind = grain, kinds[i] if kinds else None
        _, members = filling.get(kind, (grain, []))
        if members and sum(math.prod(shapes[j]) for j in (*members, i)) > size:
            closed.append(filling[kind])
            members = []
        filling[kind] = grain, [*members, i]
    complete = sorted([*closed, *filling.values()], key=lambda bucket: -bucket[1][-1])
    return [_plan(members, [math.prod(shapes[i]) for i in members], grain, world) for grain, members in complete]


def _plan(members: list[int], numels: list[int], grain: int, world: int) -> Plan:
    *offsets, end = accumulate((-(-numel // grain) * grain for numel in numels), initial=0)
    return Plan(members, offsets, max(1, -(-end // (world * grain))) * grain)


class Bucket:
    """The weights and the gradients of some parameters, each in one flat buffer that the parameters are views of.

        buffer = [parameter, padding, parameter, ..., padding] = [range of rank 0, range of rank 1, ...]

    Rank r updates the r-th of `world` equal ranges, whichever parameters lie there, so that one reduce-scatter of the
    gradients and one all-gather of the weights are all that the ranks exchange, and neither needs a copy.

    Args:
        plan: Where the parameters lie.
        params: The parameters of the model, of which these are some.
        world: The number of ranks.
        rank: This rank.
        offload: Whether the optimizer updates this rank's range on the host.

    Attributes:
        params: The parameters in the bucket.
        weights, grads: The buffers.
        views: The gradient of each parameter, a view of `grads`.
        own: The elements that this rank owns.
        ranges: For each parameter the elements of it that this rank owns.
        ranges_in_own: For each parameter with such elements, the first of them in the range, and `ranges`.
        host: The range on the host, if that is where it is updated.
    """

    def __init__(self, plan: Plan, params: Sequence[Tensor], world: int, rank: int, offload: bool = False) -> None:
        self.params = tuple(params[i] for i in plan.members)
        self.weights = self.params[0].detach().new_zeros(world * plan.share)
        self.grads = torch.zeros_like(self.weights)
        self.own = slice(rank * plan.share, (rank + 1) * plan.share)
        self._world, self._offsets = world, dict(zip(self.params, plan.offsets))
        self.views, self._addresses, self.ranges = [], [], []
        for p, offset in zip(self.params, plan.offsets):
            at = slice(offset, offset + p.numel())
            p.data = self.weights[at].view(p.shape).copy_(p.detach())  # frees the memory that it had
            self._addresses.append(p.data_ptr())
            self.views.append(self.grads[at].view(p.shape))
            start, stop = (min(max(edge - offset, 0), p.numel()) for edge in (self.own.start, self.own.stop))
            self.ranges.append(Range(start, stop - start))
        self.ranges_in_own = {
            p: (offset + own.start - self.own.start, own)
            for p, offset, own in zip(self.params, plan.offsets, self.ranges)
            if own.numel
        }
        self.host = HostRange(self) if offload else None

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """Returns the range of each rank in a buffer of this bucket."""
        return list(buffer.view(self._world, -1).unbind())

    def cuts(self, param: Tensor, block: int) -> bool:
        """Whether a range, of any rank, ends within one of a parameter's blocks of so many elements."""
        if (first := self._offsets.get(param)) is None:
            return False
        share = len(self.weights) // self._world
        ends = range(-(-first // share) * share, first + param.numel(), share)
        return any((end - first) % block for end in ends)

    def adopt(self) -> None:
        """Moves the gradients that autograd has made into the buffer."""
        fresh = [i for i, p in enumerate(self.params) if p.grad is not None and p.grad is not self.views[i]]
        if fresh:
            torch._foreach_copy_([self.views[i] for i in fresh], [self.params[i].grad for i in fresh])  # type: ignore[misc]
        for i in fresh:
            self.params[i].grad = self.views[i]

    def poison(self, buffer: Tensor) -> None:
        """Fills the ranges of other ranks with NaN, so that a stale read of them is seen."""
        buffer[: self.own.start].fill_(math.nan)
        buffer[self.own.stop :].fill_(math.nan)

    def heal(self) -> None:
        """Makes poisoned gradients this rank's share of the mean, so that the next exchange gives the sum of both."""
        self.grads[: self.own.start].zero_()
        self.grads[self.own].mul_(self._world)
        self.grads[self.own.stop :].zero_()

    def moved(self) -> Tensor | None:
        """Returns the first parameter whose weights are not in the buffer any more, if there is one."""
        return next((p for p, at in zip(self.params, self._addresses) if p.data_ptr() != at), None)


def make_buckets(params: Sequence[Tensor], world: int, rank: int, offload: bool = False) -> list[Bucket]:
    """Moves parameters, given in the order of the forward pass, into buckets."""
    plans = plan_buckets([p.shape for p in params], world, [(p.dtype, p.device) for p in params])
    return [Bucket(plan, params, world, rank, offload) for plan in plans]


def _grain(shape: Sequence[int], most: int) -> int:
    """Returns the elements between which ranges may end: rows, or where these are too long, parts of them.

    `_BLOCK` divides no sum of a norm if it divides the row. A vector may end anywhere.
    """
    rows = (math.prod(shape[i:]) for i in range(1, len(shape)))
    row = next((row for row in rows if 0 < row <= most), _BLOCK)
    return row * -(-_LEAST // row)
