"""The collectives of a training step: one function for each engine."""

from __future__ import annotations

import functools

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.layout.bucket import plan_buckets
from distopt.plan.footprint import Collective, Units, all_params, numel, shards

# Defaults of DeepSpeed 0.19.8's stage 3, in elements. Parameters up to the first size stay gathered from their first
# use until the step. Others stay gathered if they are used again within the second: from forward to backward its last
# half.
_PERSISTENT = 10**5
_REUSED = 10**9


@functools.singledispatch
def wire(engine: Engine, units: Units, world: int, passes: int) -> list[Collective]:
    """Return the collectives of a step, except those of norms and of Adafactor's sums, which are small.

    Args:
        engine: The engine.
        units: The parameters of the model.
        world: The number of ranks.
        passes: The number of forward and backward passes of a step.

    Raises:
        ValueError: For an engine that has no function here.
    """
    raise ValueError(f"no plan is known for {type(engine).__name__}: register one at distopt.plan.wire.wire")


@wire.register
def _(engine: DDP, units: Units, world: int, passes: int) -> list[Collective]:
    return [Collective("all_reduce", 4 * numel(all_params(units), trained=True), world, 1, "backward")]


@wire.register
def _(engine: Zero1, units: Units, world: int, passes: int) -> list[Collective]:
    plans = plan_buckets([param.shape for param in all_params(units) if param.trained], world)
    padded = world * sum(plan.share for plan in plans)
    width = 2 if engine.param_dtype else 4
    reduced = {"bf16": 2, "fp32": 4, None: width}[engine.reduce_dtype]
    return [
        Collective("reduce_scatter", reduced * padded, world, 1, "backward"),
        Collective("all_gather", width * padded, world, 1, "step"),
    ]


@wire.register
def _(engine: FSDP2, units: Units, world: int, passes: int) -> list[Collective]:
    ranks, width = world // engine.replicas, 2 if engine.bf16 else 4
    params, blocks = all_params(units), units[:-1]
    reduced = passes if engine.sync_each_batch else 1
    trained = 4 * shards(params, ranks, trained=True)
    sent = [
        Collective("all_gather", width * ranks * shards(params, ranks), ranks, passes, "forward"),
        Collective("reduce_scatter", ranks * trained, ranks, reduced, "backward"),
    ]
    if engine.reshard_after_forward:
        again = engine.grouped([numel(block) for block in blocks], world)[:-1]  # the last unit is gathered still
        resharded = sum(shards(blocks[i], ranks) for unit in again for i in unit)
        sent.append(Collective("all_gather", width * ranks * resharded, ranks, passes, "backward"))
    if engine.replicas > 1:
        sent.append(Collective("all_reduce", trained, engine.replicas, reduced, "backward", across=True))
    return sent


@wire.register
def _(engine: DeepSpeed, units: Units, world: int, passes: int) -> list[Collective]:
    width, params = 2 if engine.bf16 else 4, all_params(units)
    trained = width * numel(params, trained=True)
    if engine.stage < 3:
        # 0.19.8 all-reduces buckets of gradients that span several partitions, even if its option says reduce_scatter.
        return [
            Collective("all_reduce", trained, world, 1 if engine.stage == 1 else passes, "backward"),
            Collective("all_gather", trained, world, 1, "step"),
        ]
    kept = numel(param for param in params if param.numel <= _PERSISTENT)
    released = numel(params) - kept
    return [
        Collective("all_gather", width * kept, world, 1, "forward"),
        Collective("all_gather", width * released, world, passes, "forward"),
        Collective("all_gather", width * max(0, released - _REUSED // 2), world, passes, "backward"),
        Collective("reduce_scatter", trained, world, passes, "backward"),
    ]
