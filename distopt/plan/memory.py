"""The memory of a step: one function for each engine, which computes with shapes alone."""

from __future__ import annotations

import functools
from dataclasses import replace

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.engine.mezo import CHUNK, NOISE_BYTES
from distopt.layout.bucket import FRESH, Plan, plan_buckets
from distopt.plan.footprint import Footprint, Param, Units, all_params, numel, shards, state_bytes


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
    state = state_bytes(params, lambda param: param.numel)
    fresh = 4 * max(
        (param.numel for param in params if param.trained), default=0
    )  # a gradient before DDP copies it into its bucket
    gradients = 4 * numel(params, trained=True)  # in DDP's buckets, in addition to the accumulated ones
    return Footprint(4 * numel(params), gradients, state, fresh, accumulated=gradients)


@footprint.register
def _(engine: Zero1, units: Units, world: int) -> Footprint:
    params, width = all_params(units), 2 if engine.param_dtype else 4
    trained = [param for param in params if param.trained]
    plans = plan_buckets([param.shape for param in trained], world)
    buffers = width * world * sum(plan.share for plan in plans)  # of the weights, and of the gradients
    state = [4.0 * sum(param.replicated for param in trained)] * world
    for plan in plans:
        for i, offset in zip(plan.members, plan.offsets):
            end = offset + trained[i].numel
            for rank in range(offset // plan.share, -(-end // plan.share)):
                own = min(end, (rank + 1) * plan.share) - max(offset, rank * plan.share)
                state[rank] += (4 * trained[i].slots + (trained[i].beside if engine.param_dtype else 0)) * own
    most, frozen = int(max(state)), 4 * (numel(params) - numel(trained))
    fresh = width * _fresh(trained, plans)
    if engine.offload:  # and this rank's ranges of the buffers
        return Footprint(buffers + frozen, buffers, 0, fresh, host=most + 2 * buffers // world)
    return Footprint(buffers + frozen, buffers, most, fresh)


def _fresh(trained: list[Param], plans: list[Plan]) -> int:
    """Return the most elements of gradients that are not in their bucket yet."""
    bucket_of = {i: j for j, plan in enumerate(plans) for i in plan.members}
    fresh, most = [0] * len(plans), 0
    for i in reversed(range(len(trained))):
        j = bucket_of[i]
        fresh[j] += trained[i].numel
        most = max(most, sum(fresh))
        if fresh[j] >= FRESH or i == plans[j].members[-1]:
            fresh[j] = 0
    return most


@footprint.register
def _(engine: FSDP2, units: Units, world: int) -> Footprint:
    ranks, width = world // engine.replicas, 2 if engine.bf16 else 4
    params, (*blocks, outside) = all_params(units), units
    sizes = [numel(block) for block in blocks]
    inner = [sum(sizes[i] for i in unit) for unit in engine.grouped(sizes, world)]
    embedding, head, rest = (numel(p for p in outside if p.end == end) for end in ("embedding", "head", ""))
    # What stays gathered until the backward pass ends, and until it has left the head.
    kept = rest + (0 if engine.reshard_after_forward else embedding)
    until_head = kept + head + sum(inner if not engine.reshard_after_forward else inner[-1:])
    # The last unit has unsharded gradients and a buffer in which they are reduced, while the one before it is
    # prefetched; those of the rest are unsharded until the pass ends.
    inside = [0]
    for i, unit in enumerate(inner):
        gathered = unit + (inner[i - 1] if i else 0) if engine.reshard_after_forward else sum(inner)
        inside.append(width * (gathered + unit) + 4 * unit)
    left_head = width * (until_head + head) + 4 * head
    if noise := _noise(units, ranks):  # no gradients
        bytes_of_units = [width * unit for unit in inner]
        found = _forward_only(engine, params, ranks, bytes_of_units, width * kept, width * until_head, noise)
    else:
        found = Footprint(
            parameters=4 * shards(params, ranks),
            gradients=4 * shards(params, ranks, trained=True),
            state=state_bytes(params, lambda param: param.shard(ranks)),
            gathered=max(width * (kept + rest) + max(inside), left_head if head else 0),
            outside=width * until_head,
            ending=width * (kept + rest + embedding) + 4 * max(rest, embedding),
            early=False,
        )
    if not engine.offload:
        return found
    host = found.parameters + found.gradients + found.state + found.noise
    # The gradients of a unit that are not on the host yet.
    reduced = 4 * -(-max(inner, default=0) // ranks) if found.gradients else 0
    gathered = found.gathered + reduced
    return replace(found, parameters=0, gradients=0, state=0, noise=0, host=host, gathered=gathered)


def _forward_only(
    engine: FSDP2, params: list[Param], ranks: int, inner: list[int], kept: int, outside: int, noise: int
) -> Footprint:
    """Return the memory of MeZO: a unit, the next one and the buffer of its all-gather, and no gradients."""
    held = 0 if engine.reshard_after_forward else sum(inner)
    gathered = kept + held + (1 + 2 * engine.reshard_after_forward) * max(inner, default=0)
    return Footprint(4 * shards(params, ranks), 0, 0, gathered, outside, early=False, noise=noise)


@footprint.register
def _(engine: DeepSpeed, units: Units, world: int) -> Footprint:
    params, width = all_params(units), 2 if engine.bf16 else 4
    part, full = -(-numel(params, trained=True) // world), numel(params)
    low = width * (-(-full // world) if engine.stage == 3 else full)
    masters = 4 * part
    state = state_bytes(params, lambda param: -(-param.numel // world))
    gradients = width * (full if engine.stage == 1 else part) + (4 * part if engine.bf16 else 0)
    block = max((numel(unit) for unit in units), default=0)
    host = 0
    if engine.offload:
        masters, state, host = 0, 0, masters + state + 4 * part
    gathered = 4 * width * block if engine.stage > 1 else 0
    return Footprint(low + masters, gradients, state, gathered, gathered, host=host)
