"""The memory that an engine needs: one function for each engine, of numbers alone."""

from __future__ import annotations

import functools
from dataclasses import replace

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.plan.footprint import Footprint, Units, every_layer, numel, rows


@functools.singledispatch
def footprint(engine: Engine, units: Units, world: int) -> Footprint:
    """The bytes of a model of these layers on the rank that needs most.

    Raises:
        ValueError: For an engine that has no function here.
    """
    raise ValueError(f"no plan is known for {type(engine).__name__}: register one at distopt.plan.memory.footprint")


@footprint.register
def _(engine: DDP, units: Units, world: int) -> Footprint:
    return _replicated(units)


def _replicated(units: Units) -> Footprint:
    layers = every_layer(units)
    state = sum(4 * layer.slots * layer.numel for layer in layers)
    fresh = 4 * max((layer.numel for layer in layers if layer.trained), default=0)  # not yet in its bucket
    gradients = 4 * numel(layers, trained=True)  # in DDP's buckets, which those of earlier micro-batches are not in
    return Footprint(4 * numel(layers), gradients, state, fresh, accumulated=gradients)


@footprint.register
def _(engine: Zero1, units: Units, world: int) -> Footprint:
    state = sum(4 * layer.slots * layer.rows(world) for layer in every_layer(units))
    return replace(_replicated(units), state=state)


@footprint.register
def _(engine: FSDP2, units: Units, world: int) -> Footprint:
    ranks, width = world // engine.replicas, 2 if engine.bf16 else 4
    layers, (*inner, root) = every_layer(units), units
    block = max((numel(unit) for unit in inner), default=0)
    # What lies outside of the blocks stays. Later its gradients are whole too, until the end of the backward pass;
    # one block is gathered ahead, and the gradients of another are whole, and in the buffer that is reduced.
    outside = width * (numel(root) + (0 if engine.reshard_after_forward else sum(map(numel, inner))))
    whole = outside + width * numel(root) + (width * (1 + 2 * engine.reshard_after_forward) + 4) * block
    return Footprint(
        parameters=4 * rows(layers, ranks),
        gradients=4 * rows(layers, ranks, trained=True),
        state=sum(4 * layer.slots * layer.rows(ranks) for layer in layers),
        gathered=whole,
        outside=outside,
        early=False,
    )


@footprint.register
def _(engine: DeepSpeed, units: Units, world: int) -> Footprint:
    layers, width = every_layer(units), 2 if engine.bf16 else 4
    part, whole = -(-numel(layers, trained=True) // world), numel(layers)
    low = width * (-(-whole // world) if engine.stage == 3 else whole)
    masters = 4 * part
    state = sum(4 * layer.slots * -(-layer.numel // world) for layer in layers)
    gradients = width * (whole if engine.stage == 1 else part) + (4 * part if engine.bf16 else 0)
    block = max((numel(unit) for unit in units), default=0)
    if engine.offload:
        masters, state = 0, 0
    whole = 4 * width * block if engine.stage > 1 else 0
    return Footprint(low + masters, gradients, state, whole, whole)
