"""The units of a plan: shapes of parameters, bytes of memory, and collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distopt.layout.places import shard_dim


@dataclass(frozen=True)
class Param:
    """A parameter of the planned model.

    Attributes:
        shape: The shape of the unsharded parameter.
        trained: Whether it requires a gradient.
        slots: The state buffers that the optimizer keeps for it, laid out as it, in float32 numbers per element: one
            of 8 bits in blocks of 128 is 1/4 + 1/128.
        replicated: The number of elements of its other state buffers, which every rank keeps.
        end: `embedding` or `head` if it is of one that FSDP2 makes a unit of its own.
        beside: The bytes that stand beside an element of 16-bit weights: 4 of a float32 master, 2 of a remainder.
        work: The multiplications of a rule on full matrices, as `Rule.work`; None for a rule on elements.
    """

    shape: tuple[int, ...]
    trained: bool
    slots: float
    replicated: int = 0
    end: str = ""
    beside: int = 4
    work: Callable[[int, int], float] | None = None

    @property
    def numel(self) -> int:
        """The number of elements of the unsharded parameter."""
        return math.prod(self.shape)

    def rows(self, ranks: int) -> int:
        """Return the number of elements of the largest shard when it is sharded by rows (DTensor's `Shard(0)`)."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])

    def shard(self, ranks: int) -> int:
        """Return the number of elements of the largest shard when FSDP2 shards it."""
        dim = shard_dim(self.shape, ranks)
        return self.numel // ranks if dim else self.rows(ranks)


Units = Sequence[Sequence[Param]]  # the parameters of each block, and last those outside of the blocks


@dataclass(frozen=True)
class Footprint:
    """The bytes of the rank that needs most, between steps and at the peak of a step.

    Attributes:
        parameters: The parameters with all copies: float32 masters, and the weights that the model computes with where
            those are others.
        gradients: The gradients that the optimizer's step reads.
        state: The optimizer state.
        gathered: Temporary unsharded parameters and gradients, and communication buffers, while the backward pass is
            inside the blocks.
        outside: The same before that, while the loss and the last operations of the forward pass are differentiated.
        ending: The same after that, when nothing is left to differentiate.
        early: Whether the gradients are allocated at the start of a pass, instead of one by one.
        accumulated: The additional memory of gradients when a step has several micro-batches.
        noise: What MeZO draws at once, while there are no activations.
        host: What each process keeps, and updates, in the memory of the host instead; without SAM's copies.
    """

    parameters: int
    gradients: int
    state: int
    gathered: int = 0
    outside: int = 0
    ending: int = 0
    early: bool = True
    accumulated: int = 0
    noise: int = 0
    host: int = 0


class Collective(NamedTuple):
    """Equal collectives of a step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter or all_to_all.
        size: The bytes of the unsharded tensors.
        ranks: The number of ranks of the group.
        times: How often a step starts it.
        stage: forward, backward or step.
        across: Whether each rank of the group is on a machine of its own, where there are several; otherwise the ranks
            are on as few machines as possible.
    """

    kind: str
    size: int
    ranks: int
    times: int
    stage: str
    across: bool = False

    @property
    def sent(self) -> float:
        """The bytes that each rank sends in a step.

        By a ring the tensor once, and twice for an all-reduce; its own share of it for an all-to-all.
        """
        share = (self.ranks - 1) / self.ranks
        return self.times * self.size * share * {"all_reduce": 2.0, "all_to_all": 1 / self.ranks}.get(self.kind, 1.0)


def numel(params: Iterable[Param], trained: bool = False) -> int:
    """Return the number of elements of these parameters, or of the trained ones among them."""
    return sum(param.numel for param in params if param.trained or not trained)


def rows(params: Iterable[Param], world: int, trained: bool = False) -> int:
    """Return the largest number of local elements of these parameters when each is sharded by rows."""
    return sum(param.rows(world) for param in params if param.trained or not trained)


def shards(params: Iterable[Param], ranks: int, trained: bool = False) -> int:
    """Return the largest number of local elements of these parameters when FSDP2 shards each."""
    return sum(param.shard(ranks) for param in params if param.trained or not trained)


def state_bytes(params: Iterable[Param], local: Callable[[Param], int]) -> int:
    """Return the bytes of the state of parameters, given the local elements of one of them."""
    return int(sum(4 * (param.slots * local(param) + param.replicated) for param in params))


def all_params(units: Units) -> list[Param]:
    """Return the parameters of all units."""
    return [param for unit in units for param in unit]
