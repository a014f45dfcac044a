"""The memory of a step: one function for each engine, which computes with shapes alone."""

from __future__ import annotations

import functools
from dataclasses import replace

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.engine.mezo import CHUNK, NOISE_BYTES
from distopt.plan.footprint import Footprint, Units, all_params, numel, rows


@functools.singledispatch
def footprint(engine: Engine, units: Units, world: int) -> Footprint:
    """Return the memory of a model on the rank that needs most.

    Args:
        engine: The engine.
        units: The parameters of the model.
        world: The number of ranks.

    Raises:
        ValueError: For an engine that has no function here.
    """
    raise ValueError(f"no plan is known for {type(engine).__name__}: register one at distopt.plan.memory.footprint")


@footprint.register
def _(engine: DDP, units: Units, world: int) -> Footprint:
    return replace(_replicated(units), noise=_noise(units, 1))


def _noise(units: Units, ranks: int) -> int:
    """What is drawn at once where no parameter has a gradient, since MeZO moves all of them."""
    params = all_params(units)
    if any(param.trained for param in params):
        return 0
    return NOISE_BYTES * min(CHUNK, max(param.rows(ranks) for param in params))


def _replicated(units: Units) -> Footprint:
    params = all_params(units)
    state = sum(4 * param.slots * param.numel for param in params)
    fresh = 4 * max(
        (param.numel for param in params if param.trained), default=0
    )  # a gradient before DDP copies it into its bucket
    gradients = 4 * numel(params, trained=True)  # in DDP's buckets, in addition to the accumulated ones
    return Footprint(4 * numel(params), gradients, state, fresh, accumulated=gradients)


@footprint.register
def _(engine: Zero1, units: Units, world: int) -> Footprint:
    state = sum(4 * param.slots * param.rows(world) for param in all_params(units))
    return replace(_replicated(units), state=state)


@footprint.register
def _(engine: FSDP2, units: Units, world: int) -> Footprint:
    ranks, width = world // engine.replicas, 2 if engine.bf16 else 4
    params, (*inner, root) = all_params(units), units
    block = max((numel(unit) for unit in inner), default=0)
    # Parameters outside of the blocks stay gathered. In the backward pass their gradients are unsharded as well, until
    # it ends; one block is prefetched, and another has unsharded gradients and a reduce-scatter buffer.
    outside = width * (numel(root) + (0 if engine.reshard_after_forward else sum(map(numel, inner))))
    gathered = outside + width * numel(root) + (width * (1 + 2 * engine.reshard_after_forward) + 4) * block
    if noise := _noise(units, ranks):  # no gradients: two blocks, and a buffer of the all-gather
        gathered = outside + width * (1 + 2 * engine.reshard_after_forward) * block
    return Footprint(
        parameters=4 * rows(params, ranks),
        gradients=4 * rows(params, ranks, trained=True),
        state=sum(4 * param.slots * param.rows(ranks) for param in params),
        gathered=gathered,
        outside=outside,
        early=False,
        noise=noise,
    )


@footprint.register
def _(engine: DeepSpeed, units: Units, world: int) -> Footprint:
    params, width = all_params(units), 2 if engine.bf16 else 4
    part, full = -(-numel(params, trained=True) // world), numel(params)
    low = width * (-(-full // world) if engine.stage == 3 else full)
    masters = 4 * part
    state = sum(4 * param.slots * -(-param.numel // world) for param in params)
    gradients = width * (full if engine.stage == 1 else part) + (4 * part if engine.bf16 else 0)
    block = max((numel(unit) for unit in units), default=0)
    if engine.offload:
        masters, state = 0, 0
    gathered = 4 * width * block if engine.stage > 1 else 0
    return Footprint(low + masters, gradients, state, gathered, gathered)
