"""Communication: the collectives of a training step, and the bytes that each rank sends, by formula and counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch.distributed as dist

import distopt
from benchmarks.collectives import Collectives, written
from benchmarks.wire import SIDES
from distopt.engine import DDP, FSDP2, Engine, Zero1
from distopt.engine.train_step import update
from distopt.kernels import exact
from distopt.models.language_model import LanguageModel
from distopt.plan.rehearsal import rehearse
from distopt.plan.wire import wire
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, DEEPSPEED, ENGINES, VOCABULARY, batch, made

SIZES = CONFIGS["gpt2"] | {"n_embd": 128}


def stepped(kind: str, sam: str = "", micro_batches: int = 1) -> tuple[list[str], float, int, list[int], list[int]]:
    """Measurements of a typical step: the collectives, the bytes by the ring, the bytes that gloo sent.

    And the sizes of the parameters that are gathered anew in the backward pass, which are those inside of blocks but
    the last one, and of the others, padded to rows that divide; under ZeRO-1, which knows no blocks, of its buckets.
    """
    engine = SIDES[kind].engine() if kind != "fsdp2" else FSDP2(unit_mib=0)  # the blocks here would be one unit
    model = made(LanguageModel("gpt2", SIZES), engine)
    optimizer = distopt.LAMB(distopt.param_groups(engine.unwrap(model), weight_decay=0.1), lr=0.01)
    model = engine.attach(model, optimizer, micro_batches, 1.0)
    stepper = distopt.SAM(optimizer, scope=sam) if sam else optimizer
    for step in range(2):  # state is made, and DDP orders its buckets anew, once
        update(engine, model, stepper, list(batch(step).chunk(micro_batches)), 1.0)
    dist.barrier()
    with Collectives() as mode:
        before = written()
        update(engine, model, stepper, list(batch(2).chunk(micro_batches)), 1.0)
        engine.unwrap(model)  # what is still on its way has come
        after = written()
    dist.barrier()
    sizes: tuple[list[int], list[int]] = ([], [])
    world = dist.get_world_size()
    for name, p in engine.unwrap(model).named_parameters():
        rows = p.shape[0] if kind == "ddp" else -(-p.shape[0] // world) * world
        sizes[".h." not in name or f".h.{SIZES['n_layer'] - 1}." in name].append(4 * rows * math.prod(p.shape[1:]))
    buckets = [4 * len(bucket.weights) for bucket in getattr(optimizer.layout, "buckets", ())]
    return mode.seen, mode.sent, after - before, *((buckets, []) if buckets else sizes)


def number_of_parameters() -> int:
    model = LanguageModel("gpt2", SIZES)
    return len(list(model.empty(model.describe(VOCABULARY)).parameters()))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", SIDES)
def test_a_step_sends_the_bytes_of_the_formula(kind: str, world: int) -> None:
    """To the byte, padding included: zero1 sends what DDP sends, 2 psi (N-1)/N, and not 3. Norms are one all-reduce to
    clip by (of gradients) and one for LAMB (of weights and directions), sums in float64 digits for all layers."""
    results = run(world, stepped, kind)
    for seen, sent, really, inside, outside in results:
        parts = (SIDES[kind].inside * sum(inside) + SIDES[kind].outside * sum(outside)) * (world - 1) / world
        clip, lamb = (
            2 * (world - 1) / world * 8 * exact.DIGITS * columns * number_of_parameters() for columns in (1, 2)
        )
        norms, count = {"ddp": (0.0, 0), "zero1, full gradients": (lamb, 1)}.get(kind, (clip + lamb, 2))
        if count < 2:  # DDP pads nothing, and reduces its buckets
            assert sent - norms == pytest.approx(parts, rel=0.01)
        else:
            assert sent - norms == parts
        if count == 2:
            assert sum("allreduce" in operation for operation in seen) == count
        if "2" not in kind:  # FSDP2's reduce-scatter is an all-reduce inside of gloo
            assert really == pytest.approx(sent, rel=0.02)


@pytest.mark.parametrize("kind", ["ddp", "zero1, full gradients", "zero1"])
def test_sam_and_accumulation_send_no_more_than_necessary(kind: str) -> None:
    """SAM under zero1 sends 4 psi (N-1)/N as under DDP: gradients of rows twice, perturbed rows and updated rows. With
    scope=local 2 psi; whatever the number of micro-batches."""
    for sam, passes in (("global", 4), ("local", 2)):
        for micro_batches in (1, 2):
            for _, _, really, inside, outside in run(2, stepped, kind, sam, micro_batches):
                more = kind == "zero1, full gradients"
                assert really / (sum(inside) + sum(outside)) == pytest.approx((passes + more) / 2, rel=0.03)


WIDE = CONFIGS["gpt2"] | {"n_embd": 192}  # DeepSpeed keeps parameters of up to 100,000 elements gathered
PLANNED: dict[str, Callable[..., Engine]] = {**ENGINES, "zero1, reduce_dtype=bf16": partial(Zero1, reduce_dtype="bf16")}
IN_STEPS = [("fp32", 1), ("fp32", 2), ("bf16", 2)]  # and micro-batches
WORLDS = [
    pytest.param(kind, world, marks=[pytest.mark.matrix] if world == 4 or kind in DEEPSPEED else [])
    for kind in PLANNED
    for world in (2, 4)
    if (kind, world) != ("hsdp", 2)
]


def planned(kind: str) -> list[tuple[float, float]]:
    """The planned and the counted bytes that a rank sends in a step, for each of IN_STEPS."""
    language_model, world = LanguageModel("gpt2", WIDE), dist.get_world_size()
    units = rehearse(DDP(), language_model, distopt.param_groups, distopt.AdamW, VOCABULARY, 1, 2).units
    found = []
    for precision, micro_batches in IN_STEPS:
        engine = PLANNED[kind](precision=precision)
        model = made(language_model, engine)
        optimizer = distopt.AdamW(distopt.param_groups(engine.unwrap(model)), lr=0.01)
        model = engine.attach(model, optimizer, micro_batches, math.inf)
        for step in range(2):
            update(engine, model, optimizer, list(batch(step).chunk(micro_batches)), math.inf)
        with Collectives() as mode:
            update(engine, model, optimizer, list(batch(2).chunk(micro_batches)), math.inf)
        norm = 0 if kind == "ddp" else 8 * exact.DIGITS * 2 * sum(map(len, units))  # over the ranks that shard
        shards = world // 2 if kind == "hsdp" else world
        norms = 0.0 if kind in DEEPSPEED else norm * (shards - 1) / shards
        found.append((sum(c.sent for c in wire(engine, units, world, micro_batches)), mode.sent - norms))
    return found


@pytest.mark.parametrize(("kind", "world"), WORLDS)
def test_the_bytes_of_a_plan_are_those_of_a_step(kind: str, world: int) -> None:
    """On the average of the ranks, to the byte; DeepSpeed sends a few additional values."""
    for ways in zip(*run(world, planned, kind)):
        plan, sent = (sum(numbers) / world for numbers in zip(*ways))
        assert sent == pytest.approx(plan, rel=1e-12, abs=100.0 if kind in DEEPSPEED else 0.0)
