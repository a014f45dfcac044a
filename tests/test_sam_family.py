"""SAM's family: every member is its paper's, on every layout, leaves weights as they were, and can be resumed."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import distopt
from benchmarks.collectives import Collectives
from distopt import SAM
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.engine import FSDP2
from distopt.engine.fsdp2 import reshard
from distopt.layout import local
from distopt.sam.rounding import perturb_
from tests.harness import oracles, oracles_sam
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import Row, distance, initial, named, target
from tests.harness.sams import EVERYONE, MEMBERS, RHO, Member, Task, every_member, everyone
from tests.harness.sharded import EVERYWHERE, SAMPLES, Fleet, bind, full, reduce_scattered, shard, whole

STEPS = 7  # two cycles of the longest interval, and one more
FEWER, HALF = 4, 2  # on layouts; the half is in the middle of a cycle


# A loss of outputs that bend with the weights.


def outputs(params: list[Tensor], step: int) -> Tensor:
    mean = sum(p.mean() for p in params)
    return torch.cat([(p + 0.05 * p**2 + 0.05 * mean).reshape(-1) for p in params])


def criterion(found: Tensor, step: int) -> Tensor:
    return 0.5 * (found - target(found, 1, step)).square().sum() + 0.02 * found.mean() ** 4


TASK = Task(outputs, criterion)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [*initial((), (7,), (5, 3), (4, 6), dtype=dtype), torch.zeros(4, 3, dtype=dtype)]
    return [t.requires_grad_() for t in [*tensors, initial((3, 4), dtype=dtype)[0].t()]]


def one_pass(sam: SAM, params: list[Tensor], step: int) -> Tensor:
    sam.zero_grad()
    loss = sam.loss(outputs(params, step), lambda found: criterion(found, step))
    loss.backward()
    return loss


def by_closure(sam: SAM, run_pass: Callable[[], Any]) -> Any:
    return sam.step(run_pass)


def by_verbs(sam: SAM, run_pass: Callable[[], Any]) -> Any:
    loss = run_pass() if sam.needs_ascent_gradient else None
    sam.perturb()
    if sam.ascends or not sam.needs_ascent_gradient:
        second = run_pass()
        loss = loss if sam.needs_ascent_gradient else second
    sam.restore()
    sam.step()
    return loss


def steps(sam: SAM, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        by_closure(sam, partial(one_pass, sam, params, step))


def started(member: Member, row: Row, params: list[Tensor]) -> SAM:
    return member.make(row.make(member.groups(row, params)))


def values(tensors: Any) -> list[Tensor]:
    return [local(t).detach().clone() for t in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def state_of(sam: SAM) -> list[Tensor]:
    """All numbers of the state, and the count of steps."""
    found = [state[name] for _, state in sorted(sam.state_dict()["state"].items()) for name in sorted(state)]
    return [*values(found), torch.tensor(sam.param_groups[0].get("sam_steps", 0))]


# The papers' steps.


@everyone
@pytest.mark.parametrize("way", [by_closure, by_verbs])
def test_every_step_equals_the_oracle(member: Member, row: Row, way: Callable[..., Any]) -> None:
    """Two groups with rhos of their own, one norm over both. Roundings of 1e-16, some stretched by Adam's root."""
    params = leaves()
    expected = member.expected(row, params, TASK, STEPS)
    sam = started(member, row, params)
    for step in range(STEPS):
        unperturbed = criterion(outputs(params, step), step).item()
        loss = way(sam, partial(one_pass, sam, params, step))
        if sam.needs_ascent_gradient:
            assert loss.item() == unperturbed
        assert distance([p.detach() for p in params], expected[step]) < 1e-12, step


def test_no_two_members_are_the_same() -> None:
    """Or an oracle might be equal to what does nothing."""
    ends = {m.name: m.expected(named("adamw"), leaves(), TASK, STEPS)[-1] for m in MEMBERS}
    ends["none"] = named("adamw").expected(leaves(), TASK.grad, STEPS)[-1]
    names = list(ends)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert distance(ends[a], ends[b]) > 1e-4, (a, b)


@pytest.mark.parametrize(("member", "row"), [pair for pair in EVERYONE if pair[1].peer], ids=lambda value: value.name)
def test_the_optimizer_may_be_torchs(member: Member, row: Row) -> None:
    """torch's Adam makes its state only where a parameter has none: a mean of ours that was there first broke it."""
    params = leaves()
    expected = member.expected(row, params, TASK, STEPS)
    sam = member.make(row.make_peer(member.groups(row, params)))
    sam.init_state()  # as a checkpoint of the first step does
    steps(sam, params, 0, STEPS)
    assert distance([p.detach() for p in params], expected[-1]) < 1e-12


@every_member
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_first(member: Member, how: Callable[[Any], Any]) -> None:
    """Also between two looks, with the count of steps and the state that is our own."""
    params = leaves()
    sam = started(member, named("adamw"), params)
    steps(sam, params, 0, 4)
    other = how(sam)
    again = [p for group in other.param_groups for p in group["params"]]
    order = [p for group in sam.param_groups for p in group["params"]]
    back = [next(i for i, q in enumerate(order) if q is p) for p in params]
    steps(sam, params, 4, STEPS)
    steps(other, [again[i] for i in back], 4, STEPS)
    assert equal(values(params), values(again[i] for i in back))
    assert equal(state_of(sam), state_of(other))
    assert {name: vars(other)[name] for name in member.kwargs} == member.kwargs


# Weights that come back.


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_restored_bit_for_bit(member: Member, dtype: torch.dtype) -> None:
    params = leaves(dtype)
    sam = started(member, named("adamw"), params)
    cycle = len(member.reduces)
    steps(sam, params, 0, cycle)
    before = values(params)
    if sam.needs_ascent_gradient:
        one_pass(sam, params, cycle)
    sam.perturb()
    assert not any(torch.equal(p, b) for p, b in zip(params, before))
    one_pass(sam, params, cycle)
    sam.restore()
    assert equal(values(params), before)


@every_member
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("at", range(3))
def test_a_pass_that_raises_leaves_weights_and_state(member: Member, failing: int, at: int) -> None:
    """The step can be taken again, and the run is the one that nothing happened to."""
    params, others = leaves(), leaves()
    sam, calm = started(member, named("adamw"), params), started(member, named("adamw"), others)
    steps(sam, params, 0, at)
    steps(calm, others, 0, at)
    before, state = values(params), state_of(sam)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        loss = one_pass(sam, params, at)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    if failing == 1 or (sam.needs_ascent_gradient and sam.ascends):
        with pytest.raises(KeyboardInterrupt):
            sam.step(closure)
        assert equal(values(params), before)
        assert equal(state_of(sam), state)
    steps(sam, params, at, STEPS)
    steps(calm, others, at, STEPS)
    assert equal(values(params), values(others))


def test_a_warning_that_is_an_error_leaves_the_weights() -> None:
    """It is raised when they have moved already; they stayed perturbed, and perturb() refused to be called again."""
    params = leaves(torch.float16)
    before = values(params)
    sam = SAM(distopt.SGD(params), rho=1e-4)
    one_pass(sam, params, 0)
    with pytest.raises(UserWarning, match="lost in rounding"), sam.perturbed():
        raise AssertionError("not reached")
    assert equal(values(params), before)
    steps(sam, params, 0, 1)


@every_member
def test_a_zero_gradient_perturbs_nothing(member: Member) -> None:
    params = leaves()
    sam = started(member, named("adamw"), params)
    before = values(params)
    for _ in range(4):  # a whole cycle
        for p in params:
            p.grad = torch.zeros_like(p)
        sam.loss(params[1] * 0.0, torch.sum)
        assert sam.perturb().item() == 0.0
        assert equal(values(params), before)
        sam.loss(params[1] * 0.0, torch.sum)
        sam.restore()
        assert all(p.grad.eq(0.0).all() for p in params)
        sam.count_step()


@every_member
@pytest.mark.parametrize("which", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_is_left_out_leaves_no_trace(member: Member, which: int, value: float) -> None:
    """A gradient that is not finite, in either pass: the mean of FriendlySAM was nan for ever after."""
    params, others = leaves(), leaves()
    sam, calm = started(member, named("adamw"), params), started(member, named("adamw"), others)
    cycle = len(member.reduces)
    steps(sam, params, 0, cycle)
    steps(calm, others, 0, cycle)
    before, state = values(params), state_of(sam)
    if sam.needs_ascent_gradient:
        one_pass(sam, params, 9)
        if which == 1:
            params[3].grad[0, 0] = value
    norm = sam.perturb()
    one_pass(sam, params, 9)
    if which == 2 or not sam.needs_ascent_gradient:
        params[3].grad[0, 0] = value
    elif which == 1:
        assert not norm.isfinite()
    sam.restore()
    assert not distopt.clip_grad_norm_(sam, 1.0).isfinite()
    assert equal(values(params), before)
    assert equal(state_of(sam), state)
    steps(sam, params, cycle, STEPS)
    steps(calm, others, cycle, STEPS)
    assert equal(values(params), values(others))
    assert equal(state_of(sam), state_of(calm))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sgd: distopt.ASAM(sgd, eta=-0.1), "eta must be a number >= 0, got -0.1"),
        (lambda sgd: distopt.ASAM(sgd, rho=0), "rho must be a number > 0, got 0; leave SAM out for rho = 0"),
        (lambda sgd: distopt.GSAM(sgd, alpha=-1), "alpha must be a number >= 0, got -1"),
        (lambda sgd: distopt.GSAM(sgd, alpha=math.inf), "alpha must be a number >= 0, got inf"),
        (lambda sgd: distopt.GSAM(sgd, alpha=math.nan), "alpha must be a number >= 0, got nan"),
        (lambda sgd: distopt.GSAM(sgd, alpha=True), "alpha must be a number >= 0, got True"),
        (lambda sgd: distopt.FriendlySAM(sgd, sigma=1.5), "sigma must be a number >= 0 and <= 1, got 1.5"),
        (lambda sgd: distopt.FriendlySAM(sgd, decay="1"), "decay must be a number >= 0 and <= 1, got '1'"),
        (lambda sgd: distopt.LookSAM(sgd, alpha=-0.5), "alpha must be a number >= 0, got -0.5"),
        (lambda sgd: distopt.LookSAM(sgd, interval=0), "interval must be an integer >= 1, got 0; 1 perturbs at every"),
        (lambda sgd: SAM(sgd, interval=1.5), "interval must be an integer >= 1, got 1.5"),
        (lambda sgd: SAM(sgd, interval=True), "interval must be an integer >= 1, got True"),
        (lambda sgd: SAM(sgd, scope="rank"), "scope must be global or local, got 'rank'"),
        (lambda sgd: distopt.MomentumSAM(sgd), "SGD has no momentum to perturb along: give it some, or use SAM"),
        (lambda sgd: distopt.PreconditionedSAM(sgd), "SGD has no second moments: use Adam, AdamW, LAMB or RMSprop"),
        (lambda sgd: distopt.FunctionalSAM(sgd), "SGD has no second moments"),
        (lambda sgd: distopt.PreconditionedSAM(distopt.AdamW(leaves()), eps=0), "eps must be a number > 0, got 0"),
        (
            lambda sgd: SAM(distopt.SGD([{"params": leaves(), "sam_rho": -1}])),
            "sam_rho of a param group must be a number >= 0, got -1",
        ),
        (
            lambda sgd: SAM(sgd).add_param_group({"params": leaves(), "sam_rho": "wide"}),
            "sam_rho of a param group must",
        ),
        (
            lambda sgd: SAM(sgd).add_param_group({"params": leaves(), "rho": 0.1}),
            "rho=0.1, which is no option of SGD: SAM's radius for a group is called sam_rho",
        ),
        (lambda sgd: SAM(SAM(sgd)), "the optimizer is a SAM already, and SAM around SAM is neither: use one"),
        (lambda sgd: distopt.LookSAM(distopt.ASAM(sgd)), "the optimizer is a ASAM already"),
        (lambda sgd: SAM(sgd.param_groups), "SAM goes around an optimizer, got list: make one first"),
        (
            lambda sgd: distopt.MomentumSAM(torch.optim.RMSprop(leaves())),
            "RMSprop has no momentum to perturb along: give it some, or use SAM",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(distopt.SGD(leaves()))


def test_functional_sam_refuses_passes_that_do_not_show_their_outputs() -> None:
    params = leaves()
    before = values(params)
    sam = distopt.FunctionalSAM(distopt.SGD(params), precondition=False)
    criterion(outputs(params, 0), 0).backward()
    with pytest.raises(RuntimeError, match=r"the first pass has shown no outputs: compute its loss by sam\.loss"):
        sam.perturb()
    one_pass(sam, params, 0)
    with pytest.raises(RuntimeError, match=r"the second pass has shown fewer outputs than the first"), sam.perturbed():
        pass
    assert equal(values(params), before)
    one_pass(sam, params, 0)
    with pytest.raises(RuntimeError, match=r"more outputs than the first: give both the same micro"), sam.perturbed():
        one_pass(sam, params, 0)
        one_pass(sam, params, 0)
    assert equal(values(params), before)
    steps(sam, params, 0, 1)
    assert not equal(values(params), before)


# What the second pass must not move.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@every_member
def test_the_statistics_of_batch_norm_are_those_of_the_first_pass(member: Member) -> None:
    """The second pass, at other weights, moved them as well, and num_batches_tracked twice a step."""
    torch.manual_seed(0)
    model, x = Normed().double(), torch.randn(8, 3, dtype=torch.float64)
    optimizer = named("adamw").make(model.parameters(), lr=0.01)
    sam = member.make(optimizer, **({} if member.cls is distopt.MomentumSAM else {"model": model}))

    def closure() -> Tensor:
        sam.zero_grad()
        loss = sam.loss(model(x), lambda y: y.square().sum())
        loss.backward()
        return loss

    for step in range(STEPS):
        plain = copy.deepcopy(model)
        plain(x)
        sam.step(closure)
        assert model.norm.num_batches_tracked.item() == step + 1
        if sam.needs_ascent_gradient:
            assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
            assert torch.equal(model.norm.running_var, plain.norm.running_var)
        assert not torch.equal(model.first.weight, plain.first.weight)


@every_member
def test_both_passes_draw_the_same_and_the_generator_ends_as_after_one(member: Member) -> None:
    params = leaves()
    sam = started(member, named("adamw"), params)
    drawn: list[Tensor] = []

    def closure() -> Tensor:
        drawn.append(torch.rand(3))
        if len(drawn) == 2:
            torch.rand(5)  # whatever more the second pass draws
        return one_pass(sam, params, 0)

    torch.manual_seed(3)
    for _ in range(4):
        passes = 2 if sam.needs_ascent_gradient and sam.ascends else 1
        drawn.clear()
        before = torch.get_rng_state()
        sam.step(closure)
        after = torch.get_rng_state()
        assert len(drawn) == passes
        assert equal(drawn, [drawn[0]] * passes)
        torch.set_rng_state(before)
        torch.rand(3)
        assert torch.equal(torch.get_rng_state(), after)


# On every layout.


class Losses(Fleet):
    """Models side by side, each with the losses of a batch's samples, two by two, as its outputs."""

    def forward(self, samples: Tensor, step: int) -> dict[str, Tensor]:
        return {n: torch.stack([model(pair, step) for pair in samples.split(2)]) for n, model in self.items()}


def bent(losses: Tensor) -> Tensor:
    """A loss of those outputs whose slope depends on them; functional SAM is no SAM here."""
    return 10.0 * torch.log1p(losses).mean()


def samples_of(kind: str, step: int) -> Tensor:
    """This rank's part of a batch; without a process group all of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if kind == "tp_fsdp" and world > 1:
        rank, world = rank // 2, world // 2  # ranks along tp see the same samples
    batch = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return batch.chunk(world)[rank]


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
    """The whole parameters after some steps; for world 0 nothing is sharded."""
    models, sams = fleet(kind, world, SHARDED)
    train(kind, models, sams, 0, FEWER)
    params = iter(full(models))
    return {name: [next(params) for _ in models[name].parameters()] for name in models}


@lru_cache
def results(kind: str, world: int) -> list[dict[str, list[Tensor]]]:
    return run(world, trained, kind, world) if world else [trained(kind, world)]


@pytest.mark.parametrize(
    ("kind", "world"), [(kind, world) for kind, world in EVERYWHERE if world > 2 and kind != "replicated"]
)
def test_the_update_is_that_of_the_whole_model(kind: str, world: int) -> None:
    """Odd shapes, empty shards, tied and frozen weights, one that is seldom used; gradients are clipped."""
    (expected,) = results("tp_fsdp" if kind == "tp_fsdp" else "replicated", 0)
    for result in results(kind, world):
        errors = {name: distance(result[name], expected[name]) for name in SHARDED}
        assert max(errors.values()) < 1e-12, errors


def test_the_members_differ_on_these_models() -> None:
    for kind in ("replicated", "tp_fsdp"):
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
        layout = sam._perturbed.layout
        mine = sum(shard.numel() for shard in layout.weights(sam._perturbed.owners))
        held = sum(b.numel() for b in before)
        kept = sam._perturbed.first
        if sum(copy.numel() for _, copy in sam._perturbed.copies) != held or mine > held:
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


@pytest.mark.parametrize(("kind", "world"), [("zero1", 2), ("fsdp2", 2), ("fsdp2", 4), ("tp_fsdp", 4)])
def test_shards_are_copied_once_and_restored_bit_for_bit(kind: str, world: int) -> None:
    """The copy is as large as what this rank holds of the weights, no larger. Where a direction made of state moves its
    rows, others' rows move too, and are put back without asking for them."""
    assert run(world, put_back, kind) == [[]] * world


def communicated(kind: str) -> dict[str, list[tuple[int, int]]]:
    """All-reduces, and exchanges of rows, of each step of two cycles, gradients and the optimizer's own left out."""
    models, sams = fleet(kind, 1, [name for name in PAIRS if name.endswith("-adamw")])
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in sams}
    for step in range(6):
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
    [("replicated", 2, 0), ("fsdp2", 2, 1), ("hsdp", 4, 1), ("tp_fsdp", 4, 2), ("zero1", 2, 1)],
)
def test_each_step_communicates_as_often_as_its_docstring_says(kind: str, world: int, axes: int) -> None:
    """Whatever the number of layers. Under ZeRO-1 weights are whole: it takes a norm of state to have to ask, and then
    each rank's rows go to the others, over gloo by messages; they are put back from a copy."""
    for counts in run(world, communicated, kind):
        for name, seen in counts.items():
            member, _ = PAIRS[name]
            expected = [(axes * member.reduces[step % len(member.reduces)], 0) for step in range(6)]
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


RESUMED = ["LookSAM-lamb", "FriendlySAM-adamw", "SAM every 3-adamw", "MomentumSAM every 2-adamw"]


@pytest.mark.parametrize(
    ("kind", "world", "others"),
    [("fsdp2", 2, [("fsdp2", 4), ("zero1", 2), ("replicated", 0)]), ("zero1", 2, [("fsdp2", 2), ("zero1", 4)])],
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


# Each rank by its own gradient.


class Wrapped(nn.Module):
    """Parameters, and their loss of a rank's own target, for DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(leaves()[1:5])

    def forward(self, step: Tensor) -> Tensor:
        return own_loss(list(self.weights), int(step))


def own_loss(params: list[Tensor], step: int) -> Tensor:
    return criterion(outputs(params, step), step) / (1 + step % 100)


def own_pass(sam: SAM, model: nn.Module, step: int, accumulation: int, exchange: bool) -> None:
    sam.zero_grad()
    for i in range(accumulation):
        last = exchange and i == accumulation - 1
        with contextlib.nullcontext() if last else model.no_sync():
            (model(torch.tensor(100 * step + dist.get_rank())) / accumulation).backward()


# Where whole weights lie: the layout that the optimizer is bound to, of a model of one unit.
WHOLE: dict[str, Callable[[DistributedDataParallel], Any]] = {
    "ddp": lambda model: None,
    "zero1": distopt.layout.zero1_layout,
    "zero1, scattered": reduce_scattered,
    "zero1, scattered, units": lambda model: distopt.layout.zero1_layout(
        model, units=[model.module[0]], gradients="reduce_scatter"
    ),
}


def local_steps(where: str, accumulation: int) -> tuple[list[Tensor], list[list[str]]]:
    """Steps of SAM and ASAM by each rank's own gradient; the collectives of their first passes."""
    counts, ends = [], []
    for member, kwargs in ((SAM, {}), (distopt.ASAM, {"eta": 0.02})):
        model = DistributedDataParallel(nn.Sequential(Wrapped()), gradient_as_bucket_view=True)
        row = named("momentum")
        inner = row.make(row.groups(list(model.parameters())))
        if (bound := WHOLE[where](model)) is not None:
            inner.bind(bound)
        sam = member(inner, RHO, scope="local", **kwargs)

        for step in range(4):
            with Collectives() as mode:
                own_pass(sam, model, step, accumulation, exchange=False)
                sam.perturb()
            # In its second step DDP orders its buckets anew, once, and tells the other ranks.
            counts.append([op for op in mode.seen if "broadcast" not in op])
            with Collectives() as mode:
                own_pass(sam, model, step, accumulation, exchange=True)
            assert mode.seen  # or the counter sees nothing of DDP
            sam.restore()
            sam.step()
        assert inner.layout  # waits
        ends += values(model.parameters())
    return ends, counts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", WHOLE)
def test_local_scope_is_the_mean_of_each_ranks_own_step(where: str, world: int, accumulation: int) -> None:
    """m-sharpness under DDP and ZeRO-1, with no communication before the second pass."""
    row, params = named("momentum"), leaves()[1:5]
    grads = [oracles.gradient_of(lambda ps, step, rank=rank: own_loss(ps, 100 * step + rank)) for rank in range(world)]
    expected = [
        *row.expected(params, oracles_sam.local_sam(grads, RHO), 4)[-1],
        *row.expected(params, oracles_sam.mean_of([oracles_sam.asam(g, RHO, 0.02) for g in grads]), 4)[-1],
    ]
    for ends, counts in run(world, local_steps, where, accumulation):
        assert counts == [[]] * 8
        assert distance(ends, expected) < 1e-12
    average_first = row.expected(params, oracles_sam.sam(oracles_sam.mean_of(grads), RHO), 4)[-1]
    assert distance(average_first, expected[:4]) > 1e-3  # another algorithm


def local_on_shards() -> None:
    models = shard("fsdp2", Losses({"one": whole("fsdp2")}))
    sam = SAM(distopt.SGD(models.parameters()), scope="local")
    models(samples_of("fsdp2", 0), 0)["one"].mean().backward()
    sam.perturb()


def test_local_scope_is_refused_where_weights_are_sharded() -> None:
    with pytest.raises(RankError, match=r"scope=local needs whole weights on every rank, as under DDP"):
        run(2, local_on_shards)
    with pytest.raises(
        ValueError, match=r"sam\.scope=local needs whole weights on every rank: use engine=ddp or zero1"
    ):
        FSDP2().check_sam(SAM(distopt.SGD(leaves()), scope="local"))


# Loss scaling.


def scaled(kind: str, poisoned: int) -> tuple[list[bool], list[float]]:
    """Three steps of float32 SAM under a loss scale; in the second, one rank's gradient of one pass is inf.

    Returns whether weights and state moved in each step, and the scales after them.
    """
    models: nn.Module = Fleet({"one": whole(kind, torch.float32)})
    if kind == "fsdp2":
        forward: nn.Module = shard(kind, models)
        scaler: Any = ShardedGradScaler("cpu", init_scale=1024.0)
    else:
        forward = DistributedDataParallel(models, find_unused_parameters=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    params = [p for p in models.parameters() if p.requires_grad]
    if kind == "zero1":
        optimizer: torch.optim.Optimizer = distopt.AdamW(params, lr=0.01)
        bind(kind, optimizer, models)
    else:  # a fused one takes scale and inf itself, but not through SAM: its steps were 1024 times too long
        optimizer = torch.optim.AdamW(params, lr=0.01, fused=kind != "fsdp2")
    sam = SAM(optimizer, RHO, scope="local" if kind == "local" else "global")
    moved, scales, bad = [], [], dist.get_rank() == 1

    def run_pass(step: int, which: int) -> None:
        sam.zero_grad()
        reshard(models)
        with forward.no_sync() if kind == "local" and which == 1 else contextlib.nullcontext():
            loss = forward(samples_of(kind, step).float(), step)
            scaler.scale(loss * (math.inf if bad and step == 1 and which == poisoned else 1.0)).backward()

    for step in range(3):
        before, state = values(models.parameters()), state_of(sam)
        run_pass(step, 1)
        sam.perturb()
        run_pass(step, 2)
        sam.restore()
        assert equal(values(models.parameters()), before)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")  # torch 2.13 of its own DTensor
            scaler.step(sam)
        scaler.update()
        after = state_of(sam)
        moved.append(not equal(values(models.parameters()), before))
        assert equal(after, state) != moved[-1]
        scales.append(scaler.get_scale())
    assert max(float((a - b).abs().max()) for a, b in zip(values(models.parameters()), before) if a.numel()) < 0.05
    return moved, scales


@pytest.mark.parametrize("kind", ["ddp", "local", "zero1", "fsdp2"])
@pytest.mark.parametrize("poisoned", [1, 2])
def test_under_a_loss_scale_an_overflow_in_either_pass_leaves_the_step_out(kind: str, poisoned: int) -> None:
    """On one rank only. With scope=local that rank alone knows of the first pass, until the second."""
    assert run(2, scaled, kind, poisoned) == [([True, False, True], [1024.0, 512.0, 512.0])] * 2


def test_a_loss_scale_does_not_show() -> None:
    """Also with a fused optimizer of torch's."""
    ends = []
    for scale in (None, 2.0**10):
        params = leaves()
        sam = SAM(torch.optim.AdamW(params, lr=0.05, fused=True), RHO)
        scaler = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
        for step in range(4):
            for which in (1, 2):
                sam.zero_grad()
                scaler.scale(criterion(outputs(params, step), step)).backward()
                sam.perturb() if which == 1 else sam.restore()
            scaler.step(sam)
            scaler.update()
        ends.append(values(params))
    assert distance(*ends) < 1e-12


# Accelerate.


def accumulated(micro_batches: int) -> list[Tensor]:
    """SAM in `accelerator.accumulate`, as docs/sam.md has it: both passes over the same micro-batches, under ZeRO-1."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])  # as torchrun does
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    assert accelerator.num_processes == dist.get_world_size()
    model, row = Wrapped(), named("adamw")
    sam = SAM(row.make(row.groups(list(model.parameters()))), RHO)
    model, optimizer = accelerator.prepare(model, sam)
    distopt.attach(accelerator, model, optimizer, zero_stage=1)
    replay: list[int] = []

    def backward(micro: int) -> None:
        accelerator.backward(model(torch.tensor(100 * micro + dist.get_rank())))

    for micro in range(4 * micro_batches):
        with accelerator.accumulate(model):
            replay.append(micro)
            backward(micro)
            if accelerator.sync_gradients:
                with sam.perturbed():
                    sam.zero_grad()
                    for each in replay:
                        with contextlib.nullcontext() if each == micro else accelerator.no_sync(model):
                            backward(each)
                replay.clear()
            optimizer.step()
            optimizer.zero_grad()
    return values(model.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_inside_accumulate_both_passes_go_over_the_same_micro_batches(micro_batches: int) -> None:
    row, params = named("adamw"), leaves()[1:5]

    def loss(params: list[Tensor], step: int) -> Tensor:
        parts = [(100 * (step * micro_batches + i), rank) for i in range(micro_batches) for rank in range(2)]
        return sum(own_loss(params, first + rank) for first, rank in parts) / len(parts)

    expected = row.expected(params, oracles_sam.sam(oracles.gradient_of(loss), RHO), 4)[-1]
    for ends in run(2, accumulated, micro_batches):
        assert distance(ends, expected) < 1e-12


# 16 bits.


def of_16_bits(dtype: torch.dtype, rho: float, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Parameters of that dtype, gradients, and the perturbation that is meant, flat, in float64."""
    numbers = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=numbers).to(dtype).requires_grad_() for size in ((300, 40), (77,))]
    grads = [(torch.randn(p.shape, generator=numbers) * scale).to(dtype) for p in params]
    meant = torch.cat([g.double().flatten() for g in grads])
    return params, grads, meant * (rho / float(meant.norm()))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize(
    ("how", "rho", "warns"),
    [
        ("bfloat16 on a grid", 0.02, True),  # float32 weights that bfloat16 has, as one loads them
        ("bfloat16 on a grid", 30.0, False),
        ("compute in bfloat16", 0.02, True),
        ("compute in bfloat16", 0.3, False),  # noise, at a cosine of 0.6: the mean is right
        ("float16 weights", 0.002, True),
        ("float16 weights", 3.0, False),
    ],
)
def test_rounding_is_measured_and_told_once(how: str, rho: float, warns: bool) -> None:
    """Length, share and cosine are those that are measured here, of the same perturbation."""
    params, grads, meant = of_16_bits(torch.float16 if "weights" in how else torch.float32, rho)
    low = torch.float16 if "weights" in how else torch.bfloat16
    with torch.no_grad():
        for p in params:
            p.copy_(p.to(low) if "grid" in how else p)
    sam = SAM(distopt.SGD(params), rho)
    if low == torch.bfloat16:
        sam.compute_dtype = low
    moved = flat((p + e.view_as(p).to(p.dtype)).to(low) for p, e in zip(params, meant.split([12000, 77])))
    seen = moved - flat(p.to(low) for p in params)
    share, cosine = seen @ meant / meant.square().sum(), seen @ meant / (seen.norm() * meant.norm()).clamp(min=1e-30)
    assert bool(share < 0.9 or cosine < 0.4) == warns
    for step in range(3):
        for p, g in zip(params, grads):
            p.grad = torch.zeros_like(g) if step == 0 else g.clone()  # nothing to be measured by at first
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sam.perturb()
            sam.restore()
        assert len(told) == (warns and step == 1)
        for warning in told:
            assert warning.category is UserWarning
            text = str(warning.message)
            assert "lost in rounding" in text and "raise rho, or compute in float32" in text
            assert float(re.search(r"cosine of ([\d.]+) ", text)[1]) == pytest.approx(float(cosine), abs=0.006)
            assert float(re.search(r"sees ([\d]+)%", text)[1]) == pytest.approx(100 * float(share), abs=0.6)
            assert float(re.search(r"length ([\d.e-]+) ", text)[1]) == pytest.approx(float(seen.norm()), rel=1e-2)


@pytest.mark.parametrize("rho", [0.002, 0.02, 0.3, 30.0])
def test_bfloat16_weights_move_by_what_is_meant_in_the_mean(rho: float) -> None:
    """Rounded to the nearest, nothing is left of a small perturbation. 12,077 elements, so that noise shows little."""
    params, grads, meant = of_16_bits(torch.bfloat16, rho)
    before = flat(params)
    nearest = flat((p + e.view_as(p).bfloat16()) for p, e in zip(params, meant.split([12000, 77]))) - before
    sam = SAM(distopt.SGD(params), rho)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.002 the noise is a hundred times what is meant
        for _ in range(2):  # the same each time
            for p, g in zip(params, grads):
                p.grad = g.clone()
            sam.perturb()
            seen = flat(params) - before
            sam.restore()
    share = [float(moves @ meant / meant.square().sum()) for moves in (seen, nearest)]
    noise = float((seen - meant).norm() / meant.norm()) / math.sqrt(len(meant))  # how far a share strays by chance
    assert share[0] == pytest.approx(1.0, abs=3 * noise + 0.005)
    assert noise < 1.0
    if rho <= 0.02:
        assert share[1] < 0.2
    # No element moves by more than to a neighbour of where it should be.
    unit = torch.maximum(before.abs(), (before + meant).abs()) * 2.0**-7
    assert ((seen - meant).abs() <= unit).all()


def test_what_has_no_gradient_stays_and_what_is_not_finite_spreads_in_bfloat16() -> None:
    """The bits of a nan, all set, would turn over into those of a zero."""
    weights = torch.tensor([1.0, -3.0, 0.0, 2.0, 5.0, 7.0]).bfloat16()
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    direction = torch.tensor([0.0, 0.0, 0.0, math.inf, nan, -math.inf])
    perturb_([weights], [direction], [torch.tensor(0.5, dtype=torch.float64)])
    assert weights[:3].tolist() == [1.0, -3.0, 0.0]
    assert weights[3] == math.inf and weights[4].isnan() and weights[5] == -math.inf


def test_the_slopes_of_functional_sam_are_not_lost_in_float16() -> None:
    """A mean over many tokens has slopes below 6e-8, the least that float16 has; a loss scale comes after them."""
    tokens, params = 2**25, [torch.ones(3, requires_grad=True)]
    sam = distopt.FunctionalSAM(distopt.SGD(params), precondition=False)
    for _ in range(2):
        sam.zero_grad()
        loss = sam.loss(params[0].half(), lambda logits: logits.float().square().sum() / tokens)
        (loss * 2.0**20).backward()
        assert params[0].grad.tolist() == pytest.approx([2.0**21 / tokens] * 3, rel=1e-2)
        sam.restore() if sam._perturbed else sam.perturb()


def test_float32_is_not_warned_about() -> None:
    params = leaves(torch.float32)
    sam = SAM(distopt.SGD(params), 1e-6)
    steps(sam, params, 0, 1)  # warnings are errors


def test_inner_products_of_16_bits_are_not_rounded_to_16_bits() -> None:
    """torch's dot of bfloat16 has 8 bits; GSAM and LookSAM stepped with those."""
    a, b = (torch.rand(50_001, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    layout = distopt.layout.infer_layout([a])
    (product,) = layout.dots([0], ([a], [b]))
    assert product.item() == pytest.approx((a.double() @ b.double()).item(), rel=1e-6)
