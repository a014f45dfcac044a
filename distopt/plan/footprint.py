"""What an engine holds and sends, as numbers: for plans, which run nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Layer:
    """A parameter: its shape, whether it is trained, and how many state buffers the optimizer keeps for it."""

    shape: tuple[int, ...]
    trained: bool
    slots: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows(self, ranks: int) -> int:
        """Elements of the largest of the shards that rows make (DTensor's `Shard(0)`)."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


Units = Sequence[Sequence[Layer]]  # the blocks, and last what lies outside of them


@dataclass(frozen=True)
class Footprint:
    """Bytes of the rank that holds most, between steps and at the worst moment of one.

    parameters: with all copies: float32 masters, and what the model computes with where that is another.
    gradients: as they are when the optimizer steps. early: whether that memory is taken from the start of a pass.
    state: of the optimizer. gathered: what is whole for a while (parameters, gradients, buffers to send) when the
    backward pass is in the blocks. outside: the same before, when the loss and what is computed last are at their most.
    accumulated: what gradients take beside, where a step has several micro-batches.
    """

    parameters: int
    gradients: int
    state: int
    gathered: int = 0
    outside: int = 0
    early: bool = True
    accumulated: int = 0


class Collective(NamedTuple):
    """Collectives of a step: what kind, the bytes of the whole tensors, over how many ranks, how often, and when.

    stage: forward, backward or step. across: whether each rank of the group is on a machine of its own where there are
        several machines; else they are as near together as they can be.
    """

    kind: str
    size: int
    ranks: int
    times: int
    stage: str
    across: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a step, by the ring: twice the tensor for an all-reduce, else once."""
        share = (self.ranks - 1) / self.ranks
        return self.times * self.size * share * (2 if self.kind == "all_reduce" else 1)


def numel(layers: Iterable[Layer], trained: bool = False) -> int:
    """Elements of some layers, or of those that are trained."""
    return sum(layer.numel for layer in layers if layer.trained or not trained)


def rows(layers: Iterable[Layer], world: int, trained: bool = False) -> int:
    """Elements of the same that a rank holds at most, where each layer is cut by rows."""
    return sum(layer.rows(world) for layer in layers if layer.trained or not trained)


def every_layer(units: Units) -> list[Layer]:
    """All layers."""
    return [layer for unit in units for layer in unit]
