"""Flat buffers of weights and gradients, of which each rank owns an equal range of whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.layout.range_shard import Range

# Elements of a bucket: at least 32 MB of float32, and 256 kB for each rank, as messages of a ring get smaller with more
# ranks. Of a bucket at most 1/8 is padding.
_NUMEL, _SHARE = 2**23, 2**16
_BLOCK = 512  # elements of a row that a norm adds up at once (distopt.kernels.norms)
_LEAST = 64  # elements, lest tensors of short rows begin anywhere


class Bucket:
    """The weights and the gradients of some parameters, each in one flat buffer that the parameters are views of.

        buffer = [parameter, padding, parameter, ..., padding] = [range of rank 0, range of rank 1, ...]

    Rank r updates the r-th of `world` equal ranges, whichever parameters lie there, so that one reduce-scatter of the
    gradients and one all-gather of the weights are all that the ranks exchange, and neither needs a copy.

    Args:
        params: The parameters, of one dtype and device.
        grain: The number of elements of which all offsets and ranges are multiples: a row of the parameters.
        world: The number of ranks.
        rank: This rank.
        dtype: The dtype that the parameters get.

    Attributes:
        weights, grads: The buffers.
        views: The gradient of each parameter, a view of `grads`.
        own: The elements that this rank owns.
        ranges: For each parameter the elements of it that this rank owns.
    """

    def __init__(self, params: Sequence[Tensor], grain: int, world: int, rank: int, dtype: torch.dtype) -> None:
        self.params = tuple(params)
        offsets, end = [], 0
        for p in params:
            offsets.append(end)
            end += -(-p.numel() // grain) * grain
        share = max(1, -(-end // (world * grain))) * grain
        self.weights = params[0].new_zeros(world * share, dtype=dtype, requires_grad=False)
        self.grads = torch.zeros_like(self.weights)
        self.own = slice(rank * share, (rank + 1) * share)
        self._world = world
        self.views, self._addresses, ranges = [], [], []
        with torch.no_grad():
            for p, offset in zip(params, offsets):
                at = slice(offset, offset + p.numel())
                weights = self.weights[at].view(p.shape)
                weights.copy_(p)
                p.data = weights  # frees the memory that it had
                self.views.append(self.grads[at].view(p.shape))
                self._addresses.append(p.data_ptr())
                start, stop = (min(max(edge - offset, 0), p.numel()) for edge in (self.own.start, self.own.stop))
                ranges.append(Range(start, stop - start))
        self.ranges = tuple(ranges)

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """Returns the range of each rank in a buffer of this bucket."""
        return list(buffer.view(self._world, -1).unbind())

    def adopt(self) -> None:
        """Moves the gradients that autograd has made into the buffer."""
        fresh = [i for i, p in enumerate(self.params) if p.grad is not None and p.grad is not self.views[i]]
        if fresh:
            torch._foreach_copy_([self.views[i] for i in fresh], [self.params[i].grad for i in fresh])
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


def make_buckets(
    params: Sequence[Tensor], world: int, rank: int, dtype: Callable[[Tensor], torch.dtype] = lambda p: p.dtype
) -> list[Bucket]:
    """Moves parameters into buckets, in the order in which a backward pass completes them: the reverse of theirs.

    Parameters of one bucket have rows of one length, lest a range end within a row: norms are then the same bits at
    every number of ranks, and rules that work on rows see whole ones.

    Args:
        params: The parameters, in the order of the forward pass.
        world: The number of ranks.
        rank: This rank.
        dtype: The dtype that a parameter gets.
    """
    size = max(_NUMEL, _SHARE * world)
    closed: list[tuple[int, int, list[Tensor]]] = []  # the position of the last parameter, the grain, the members
    filling: dict[tuple[Any, ...], tuple[int, int, list[Tensor]]] = {}
    for i, p in enumerate(reversed(params)):
        grain = _grain(p.shape, size // (8 * world))
        kind = grain, dtype(p), p.device
        _, _, members = filling.get(kind, (i, grain, []))
        if members and sum(map(Tensor.numel, members)) + p.numel() > size:
            closed.append(filling[kind])
            members = []
        filling[kind] = i, grain, [*members, p]
    complete = sorted([*closed, *filling.values()], key=lambda bucket: bucket[0])
    return [Bucket(members, grain, world, rank, dtype(members[0])) for _, grain, members in complete]


def _grain(shape: torch.Size, most: int) -> int:
    """Returns the elements between which ranges may end: rows, or where these are too long, parts of them.

    `_BLOCK` divides no sum of a norm if it divides the row. A vector may end anywhere.
    """
    rows = (math.prod(shape[i:]) for i in range(1, len(shape)))
    row = next((row for row in rows if 0 < row <= most), _BLOCK)
    return row * -(-_LEAST // row)
