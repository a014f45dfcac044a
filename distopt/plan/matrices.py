"""The work of a rule on full matrices (Muon): how the ranks share it, and what travels."""

from __future__ import annotations

import functools

from distopt.engine import DDP, FSDP2, Engine, Zero1
from distopt.layout.matrices import Matrix, matrices, with_owners
from distopt.plan.footprint import Collective, Units, all_params

_BYTES = 2  # bfloat16, in which the matrices travel by default


def work_of_ranks(units: Units, world: int) -> list[float]:
    """Return the multiplications of each rank in a step; an empty list for rules on elements.

    Args:
        units: The parameters of the model.
        world: The number of ranks, none of which has a full matrix already.
    """
    params = {i: param for i, param in enumerate(all_params(units)) if param.work is not None and param.trained}
    if not params:
        return []
    work = next(iter(params.values())).work
    assert work is not None
    found: list[Matrix] = [m for i, param in params.items() for m in matrices(i, param.shape)]
    ranks = [0.0] * world
    for m in with_owners(found, [{}] * world, work):
        ranks[m.owner] += work(m.rows, m.columns)
    return ranks


def _of_shards(engine: Engine, units: Units, world: int) -> list[Collective]:
    return [Collective("all_to_all", size, world, 2, "step")] if (size := _size(units)) else []


@functools.singledispatch
def matrix_wire(engine: Engine, units: Units, world: int) -> list[Collective]:
    """Return the collectives that bring full matrices to their owners and back, as if they were in one bucket."""
    return _of_shards(engine, units, world)


matrix_wire.register(Zero1, _of_shards)  # a DDP whose momentum is sharded


@matrix_wire.register
def _(engine: FSDP2, units: Units, world: int) -> list[Collective]:
    # One replica sends its shards to the owners, and every replica gets the results.
    return [c._replace(size=c.size * (1 + engine.replicas) // 2) for c in _of_shards(engine, units, world)]


@matrix_wire.register
def _(engine: DDP, units: Units, world: int) -> list[Collective]:
    # Every rank has the momentum of all matrices, and needs all results.
    return [Collective("all_gather", size, world, 1, "step")] if (size := _size(units)) else []


def _size(units: Units) -> int:
    return _BYTES * sum(param.numel for param in all_params(units) if param.work is not None and param.trained)
