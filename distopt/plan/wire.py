"""The collectives of a training step: one function for each engine."""

from __future__ import annotations

import functools

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.plan.footprint import Collective, Units, every_layer, numel, rows

# Defaults of DeepSpeed 0.19.8's stage 3, in elements. Layers up to that size stay whole from their first use on until
# the step; others stay for a next use that is no farther away: from forward to backward the last half of that.
_PERSISTENT = 10**5
_REUSED = 10**9


@functools.singledispatch
def wire(engine: Engine, units: Units, world: int, passes: int) -> list[Collective]:
    """The collectives of a step of that many forward and backward passes, except those of norms, which are small.

    Raises:
        ValueError: For an engine that has no function here.
    """
    raise ValueError(f"no plan is known for {type(engine).__name__}: register one at distopt.plan.wire.wire")


@wire.register
def _(engine: DDP, units: Units, world: int, passes: int) -> list[Collective]:
    return [Collective("all_reduce", 4 * numel(every_layer(units), trained=True), world, 1, "backward")]


@wire.register
def _(engine: Zero1, units: Units, world: int, passes: int) -> list[Collective]:
    layers = every_layer(units)
    padded = world * rows(layers, world, trained=True)
    return [
        Collective("reduce_scatter", (2 if engine.reduce_dtype == "bf16" else 4) * padded, world, 1, "backward"),
        Collective("all_gather", 4 * numel(layers, trained=True), world, 1, "step"),
    ]


@wire.register
def _(engine: FSDP2, units: Units, world: int, passes: int) -> list[Collective]:
    ranks, width = world // engine.replicas, 2 if engine.bf16 else 4
    layers, inner = every_layer(units), [layer for unit in units[:-1] for layer in unit]
    reduced = passes if engine.sync_each_batch else 1
    trained = 4 * rows(layers, ranks, trained=True)
    sent = [
        Collective("all_gather", width * ranks * rows(layers, ranks), ranks, passes, "forward"),
        Collective("reduce_scatter", ranks * trained, ranks, reduced, "backward"),
    ]
    if engine.reshard_after_forward:
        sent.append(Collective("all_gather", width * ranks * rows(inner, ranks), ranks, passes, "backward"))
    if engine.replicas > 1:
        sent.append(Collective("all_reduce", trained, engine.replicas, reduced, "backward", across=True))
    return sent


@wire.register
def _(engine: DeepSpeed, units: Units, world: int, passes: int) -> list[Collective]:
    width, layers = 2 if engine.bf16 else 4, every_layer(units)
    trained = width * numel(layers, trained=True)
    if engine.stage < 3:
        # 0.19.8 all-reduces buckets of gradients that lie in several partitions, also where it says reduce_scatter.
        return [
            Collective("all_reduce", trained, world, 1 if engine.stage == 1 else passes, "backward"),
            Collective("all_gather", trained, world, 1, "step"),
        ]
    kept = numel(layer for layer in layers if layer.numel <= _PERSISTENT)
    let_go = numel(layers) - kept
    return [
        Collective("all_gather", width * kept, world, 1, "forward"),
        Collective("all_gather", width * let_go, world, passes, "forward"),
        Collective("all_gather", width * max(0, let_go - _REUSED // 2), world, passes, "backward"),
        Collective("reduce_scatter", trained, world, passes, "backward"),
    ]
