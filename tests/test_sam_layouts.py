"""SAM's family on every layout: the same update, the same communication, and resumed."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import distopt
from benchmarks.collectives import Collectives
from distopt import SAM
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.layout import local
from distopt.layout.fsdp2 import reshard
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.optimizers import distance, named
from tests.harness.sam_steps import Losses, bent, equal, leaves, samples_of, values
from tests.harness.sams import EVERYONE, MEMBERS
from tests.harness.sharded import EVERYWHERE, MODELS, bind, full, shard, unsharded, whole

FEWER, HALF = 4, 2  # on layouts; the half is in the middle of a cycle


# On every layout.


def average(model: nn.Module) -> None:
    """What DDP does with the gradients of plain parameters."""
    plain = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "placements")]
    if dist.is_initialized() and dist.get_world_size() > 1 and plain:
        flat = torch.cat([g.view(-1) for g in plain])
        dist.all_reduce(flat)
        for g, mean in zip(plain, flat.div_(dist.get_world_size()).split([g.numel() for g in plain])):
            g.copy_(mean.view_as(g))


PAIRS = {f"{member.name}-{row.name}": (member, row) for member, row in EVERYONE}
# Each member over one optimizer, in turn: that knows nothing of who is around it, and is on all layouts by itself.
SHARDED = [f"{member.name}-{member.bases[i % len(member.bases)]}" for i, member in enumerate(MEMBERS)]


def fleet(kind: str, world: int, names: list[str]) -> tuple[nn.Module, dict[str, SAM]]:
    models = Losses({name: whole(kind) for name in names})
    if world:
        shard(kind, models)
    sams = {}
    for name in names:
        member, row = PAIRS[name]
        optimizer = row.make(member.groups(row, list(models[name].parameters())))
        bind(kind, optimizer, models[name])
        sams[name] = member.make(optimizer)
    return models, sams


def train(kind: str, models: nn.Module, sams: dict[str, SAM], first: int, last: int) -> None:
    """All members at once, in two passes. Those that need one take their step after it; the second is not theirs."""

    def run_pass(step: int) -> None:
        models.zero_grad()
        reshard(models)
        losses = models(samples_of(kind, step), step)
        sum(sam.loss(losses[name], bent) for name, sam in sams.items()).backward()
        average(models)

    for step in range(first, last):
        ahead = [sam for sam in sams.values() if not sam.needs_ascent_gradient]
        around = [sam for sam in sams.values() if sam.needs_ascent_gradient]
        for sam in ahead:
            sam.perturb()
        run_pass(step)
        ready = [*ahead, *(sam for sam in around if not sam.ascends)]
        for sam in around:
            sam.perturb()
        for sam in ready:
            sam.restore()
            distopt.clip_grad_norm_(sam, max_norm=5.0)
        waiting = [sam for sam in around if sam not in ready]
        for sam in ready:
            sam.step()
        run_pass(step)
        for sam in waiting:
            sam.restore()
            distopt.clip_grad_norm_(sam, max_norm=5.0)
            sam.step()
    reshard(models)


def trained(kind: str, world: int) -> dict[str, list[Tensor]]:
    """The full parameters after some steps; for world 0 nothing is sharded."""
    models, sams = fleet(kind, world, SHARDED)
    train(kind, models, sams, 0, FEWER)
    params = iter(full(models))
    return {name: [next(params) for _ in models[name].parameters()] for name in models}


@lru_cache
def results(kind: str, world: int) -> list[dict[str, list[Tensor]]]:
    return run(world, trained, kind, world) if world else [trained(kind, world)]


@pytest.mark.parametrize(
    ("kind", "world"),
    some(
        [("zero1", 4), ("fsdp2", 4), ("tp_fsdp", 4)],
        [(kind, world) for kind, world in EVERYWHERE if world > 2 and kind != "replicated"],
    ),
)
def test_the_update_is_that_of_the_full_model(kind: str, world: int) -> None:
    """Odd shapes, empty shards, tied and frozen weights, one that is seldom used; gradients are clipped."""
    (expected,) = results(unsharded(kind), 0)
    for result in results(kind, world):
        errors = {name: distance(result[name], expected[name]) for name in SHARDED}
        assert max(errors.values()) < 1e-12, errors


def test_the_members_differ_on_these_models() -> None:
    for kind in ("replicated", *MODELS):
        (ends,) = results(kind, 0)
        adamw = [name for name in ends if name.endswith("-adamw")]
        for i, a in enumerate(adamw):
            for b in adamw[:i]:
                assert distance(ends[a], ends[b]) > 1e-5, (a, b)


def put_back(kind: str) -> list[str]:
    """What is wrong with a perturbation on shards, and its end: the copies, the moves, the weights."""
    models, sams = fleet(kind, 1, [name for name in PAIRS if name.endswith("-adamw")])
    train(kind, models, sams, 0, 1)
    models.zero_grad()
    sum(sam.loss(out, bent) for sam, out in zip(sams.values(), models(samples_of(kind, 0), 0).values())).backward()
    average(models)
    wrong = []
    for name, sam in sams.items():
        params = [p for p in models[name].parameters() if p.requires_grad]
        before = values(params)
        for group in sam.param_groups:
            group["sam_steps"] = 0  # of a cycle the step that ascends
        sam.perturb()
        layout = sam._perturbation.layout
        mine = sum(shard.numel() for shard in layout.weights(sam._perturbation.params))
        held = sum(b.numel() for b in before)
        kept = sam._perturbation.unperturbed
        if sum(copy.numel() for copy in sam._perturbation.backup.copies) != held or mine > held:
            wrong.append(f"{name}: copies")
        if kind == "zero1" and sam.reads_optimizer_state and mine > 0.7 * held:
            wrong.append(f"{name}: moves more than its rows")
        if (kept is not None) != sam.needs_unperturbed_gradient or sum(
            g.numel() for gs in (kept or {}).values() for g in gs
        ) != (mine if sam.needs_unperturbed_gradient else 0):
            wrong.append(f"{name}: gradients")
        if any(torch.equal(local(p), b) for p, b in zip(params, before) if b.numel()):
            wrong.append(f"{name}: moved nothing")
        with contextlib.suppress(RuntimeError):  # functional SAM has not seen a second pass
            sam.restore()
        if not equal(values(params), before):
            wrong.append(f"{name}: weights")
    return wrong


COPIED = [("zero1", 2), ("fsdp2", 2), ("fsdp2", 4), ("tp_fsdp", 4)]


@pytest.mark.parametrize(("kind", "world"), some([("zero1", 2), ("tp_fsdp", 4)], COPIED))
def test_shards_are_copied_once_and_restored_bit_for_bit(kind: str, world: int) -> None:
    """The copy is as large as what this rank holds of the weights, no larger. Where a direction made of state moves its
    rows, others' rows move too, and are put back without asking for them."""
    assert run(world, put_back, kind) == [[]] * world


def communicated(kind: str) -> dict[str, list[tuple[int, int]]]:
    """Counts all-reduces and exchanges of rows in each step of a cycle and in the next, without those of the update."""
    models, sams = fleet(kind, 1, [name for name in PAIRS if name.endswith("-adamw")])
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in sams}
    for step in range(FEWER):
        models.zero_grad()
        sum(
            sam.loss(out, bent) for sam, out in zip(sams.values(), models(samples_of(kind, 0), 3 * step).values())
        ).backward()
        average(models)
        for name, sam in sams.items():
            with CommDebugMode() as mode, Collectives() as messages:  # the first does not see messages
                sam.perturb()
                with contextlib.suppress(RuntimeError):  # functional SAM has not seen a second pass
                    sam.restore()
            seen = {str(op): n for op, n in mode.get_comm_counts().items()}
            reduces = sum(n for op, n in seen.items() if "reduce" in op)
            sends = any("send" in op for op in messages.seen)
            counts[name].append((reduces, mode.get_total_counts() - reduces + sends))
            sam.step()
    return counts


@pytest.mark.parametrize(
    ("kind", "world", "axes"),
    some(
        [("fsdp2", 2, 1), ("tp_fsdp", 4, 2), ("zero1", 2, 1)],
        [("replicated", 2, 0), ("fsdp2", 2, 1), ("hsdp", 4, 1), ("tp_fsdp", 4, 2), ("zero1", 2, 1)],
    ),
)
def test_each_step_communicates_as_often_as_its_docstring_says(kind: str, world: int, axes: int) -> None:
    """Whatever the number of layers. Under ZeRO-1 weights are whole: it takes a norm of state to have to ask, and then
    each rank's rows go to the others, over gloo by messages; they are put back from a copy."""
    for counts in run(world, communicated, kind):
        for name, seen in counts.items():
            member, _ = PAIRS[name]
            expected = [(axes * member.reduces[step % len(member.reduces)], 0) for step in range(FEWER)]
            if kind == "zero1":
                of_state = member.make(named("adamw").make(leaves())).reads_optimizer_state
                moves = [n > 0 and (step > 0 or "Momentum" not in name) for step, (n, _) in enumerate(expected)]
                expected = [(n, int(m)) if of_state else (0, 0) for (n, _), m in zip(expected, moves)]
            assert seen == expected, name


# Resumed.


def first_part(folder: Path, kind: str, names: list[str]) -> None:
    for name in names:
        models, sams = fleet(kind, 1, [name])
        train(kind, models, sams, 0, HALF)
        save_checkpoint(folder / name, models, sams[name])


def second_part(folder: Path, kind: str, names: list[str], world: int) -> dict[str, list[Tensor]]:
    ends = {}
    for name in names:
        models, sams = fleet(kind, world, [name])
        with torch.no_grad():
            for p in models.parameters():
                local(p).add_(1.0)  # all of it has to come from the file
        load_checkpoint(folder / name, models, sams[name])
        train(kind, models, sams, HALF, FEWER)
        ends[name] = full(models)
    return ends


RESUMED = [
    name
    for name in SHARDED
    if name.partition("-")[0] in ("LookSAM", "FriendlySAM", "SAM every 3", "MomentumSAM every 2")
]


@pytest.mark.parametrize(
    ("kind", "world", "others"),
    [("fsdp2", 2, [("zero1", 2), ("replicated", 0)]), ("zero1", 2, [("fsdp2", 4)])],
)
def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, kind: str, world: int, others: list[tuple[str, int]]
) -> None:
    """In the middle of a cycle: what LookSAM and FriendlySAM remember is in the checkpoint, and the count of steps."""
    (expected,) = results("replicated", 0)
    run(world, first_part, tmp_path, kind, RESUMED)
    for other, ranks in others:
        ends = (
            run(ranks, second_part, tmp_path, other, RESUMED, ranks)
            if ranks
            else [second_part(tmp_path, other, RESUMED, 0)]
        )
        for end in ends:
            for name in RESUMED:
                assert distance(end[name], expected[name]) < 1e-12, (other, ranks, name)
