"""Engines: DDP, FSDP2 and HSDP train real language models as one process does, and build them unit by unit."""

from __future__ import annotations

import gc
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import distopt
from benchmarks.collectives import Collectives
from distopt.engine import DDP, FSDP2, Engine
from distopt.engine.train_step import backward, update
from distopt.job.evaluate import sample, validation_loss
from distopt.layout import local
from distopt.models.language_model import LanguageModel, blocks
from distopt.optim import LAMB, SGD
from tests.harness.distributed import RankError, run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    DEEPSPEED,
    ENGINES,
    STEPS,
    VOCABULARY,
    batch,
    full,
    made,
    mean,
)


def of_two_radii(optimizer: torch.optim.Optimizer, interval: int) -> distopt.SAM:
    """The second param group has a radius of its own."""
    optimizer.param_groups[1]["sam_rho"] = 0.03
    return distopt.SAM(optimizer, rho=0.1, interval=interval)


SAMS: dict[str, Callable[..., distopt.SAM]] = {
    "SAM": partial(distopt.SAM, rho=0.1),
    "SAM every 2": partial(of_two_radii, interval=2),
    "ASAM": partial(distopt.ASAM, rho=1.0),
    "GSAM": partial(distopt.GSAM, rho=0.1),
    "FriendlySAM": partial(distopt.FriendlySAM, rho=0.1, sigma=0.5),
    "LookSAM": partial(distopt.LookSAM, rho=0.1, interval=2),
    "MomentumSAM": partial(distopt.MomentumSAM, rho=0.1),
    # Where a second moment is small, float32's rounding of it is stretched: eps keeps that within what is tested.
    "PreconditionedSAM": partial(distopt.PreconditionedSAM, rho=0.1, eps=1e-2),
    "FunctionalSAM": partial(distopt.FunctionalSAM, rho=0.1, eps=1e-2),
}


@dataclass(frozen=True)
class Settings:
    """How a model is trained. Of these only `sam`, `optimizer` and `precision` may show in the result."""

    sam: str = ""
    optimizer: str = "SGD"
    precision: str = "fp32"
    micro_batches: int = 1
    validates: bool = False
    engine: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]
    validation: list[float]
    text: list[list[int]]


def train(kind: str, family: str, settings: Settings) -> Trained:
    engine = ENGINES[kind](precision=settings.precision, **settings.engine)
    model = made(LanguageModel(family, CONFIGS[family]), engine)
    if settings.optimizer == "LAMB":
        opt: distopt.ShardedOptimizer = LAMB(distopt.param_groups(model, weight_decay=0.1), lr=0.02)
    else:
        opt = SGD(distopt.param_groups(model, weight_decay=0.1), lr=0.3, momentum=0.9)
    model = engine.attach(model, opt, settings.micro_batches, 1.0)
    stepper = SAMS[settings.sam](opt) if settings.sam else opt
    if settings.sam:
        engine.check_sam(stepper)
    result = Trained([], [], {}, [], [])
    for step in range(STEPS):
        if settings.validates:
            loss = validation_loss(engine, model, [batch(100)], CPU)
            result.validation.append(mean(loss))
            result.text.append(sample(engine, model, [1, 2, 3], 5, seed=step, device=CPU))
        mine = batch(step)
        done = update(engine, model, stepper, mine.chunk(settings.micro_batches), max_grad_norm=1.0)
        assert done.applied
        result.losses.append(mean(done.loss))
        result.norms.append(done.grad_norm)
    engine.unwrap(model)  # weights that are still on their way have come
    result.params = full(model)
    return result


# The same training.

PLAIN = Settings()
ALL = {"micro_batches": 2, "validates": True, "engine": {"activation_checkpointing": True}}
ALL_LATE = ALL | {"engine": {"activation_checkpointing": True, "sync_each_batch": False}}
HALF = {"micro_batches": 2, "engine": {"activation_checkpointing": True}}
SETTINGS: dict[str, Settings] = {
    "plain": PLAIN,
    "LAMB": Settings(optimizer="LAMB"),
    "micro-batches": Settings(micro_batches=2),
    "micro-batches, one exchange": Settings(micro_batches=2, engine={"sync_each_batch": False}),
    "checkpointing": Settings(engine={"activation_checkpointing": True}),
    "validation between steps": Settings(validates=True),
    "SAM": Settings(sam="SAM"),
    "SAM, LAMB, all": Settings(sam="SAM", optimizer="LAMB", **ALL),
    "SAM, all, one exchange": Settings(sam="SAM", **ALL_LATE),
}
# Of the family, those with second moments over LAMB; half of them with micro-batches and activation checkpointing.
FAMILY = {
    name: Settings(sam=name, optimizer="LAMB" if "eps" in make.keywords else "SGD", **(HALF if i % 2 else {}))
    for i, (name, make) in enumerate(SAMS.items())
    if name != "SAM"
}
# ZeRO-1's own.
OVERLAP = {
    "gathers late": Settings(engine={"overlap_gather": True}),
    "gathers late, SAM, LAMB, all": Settings(
        sam="SAM", optimizer="LAMB", **ALL | {"engine": {"activation_checkpointing": True, "overlap_gather": True}}
    ),
    "reduce_dtype": Settings(engine={"reduce_dtype": "fp32"}),
}
SETTINGS_OF_ALL = SETTINGS | FAMILY | OVERLAP
SOME = ("validation between steps", "SAM, LAMB, all")
LATE = {"micro-batches, one exchange", "SAM, all, one exchange"}  # not an option of DDP
CASES = [
    *[("ddp", world, "gpt2", name) for world in (1, 2) for name in SETTINGS if name not in LATE],
    *[(kind, 2, "gpt2", name) for kind in ("fsdp2", "zero2") for name in SETTINGS],
    *[("hsdp", 4, "gpt2", name) for name in SETTINGS],
    *[("zero1", 2, "gpt2", name) for name in SETTINGS | OVERLAP if name not in LATE],
    *[("zero1", 4, family, "gathers late, SAM, LAMB, all") for family in CONFIGS],
    *[(kind, 4, family, "SAM, LAMB, all") for kind in ("ddp", "zero1") for family in CONFIGS],
    *[
        (kind, world, family, name)
        for kind, world in [("fsdp2", 1), ("hsdp", 2), ("fsdp2", 4), ("zero2", 4)]
        for family in CONFIGS
        for name in ("plain", "SAM, all, one exchange")
    ],
    *[("deepspeed_zero3", 2, "gpt2", name) for name in SETTINGS if name not in LATE],
    *[(kind, 2, "gpt2", name) for kind in DEEPSPEED[:2] for name in ("LAMB", "micro-batches", "SAM, LAMB, all")],
    *[(kind, 2, "gpt2", name) for kind in ("ddp", "zero1", "fsdp2") for name in FAMILY],
    *[(kind, 4, "gpt2", name) for kind in ("zero2", "hsdp") for name in FAMILY],
    *[(kind, 2, "gpt2", "SAM every 2") for kind in DEEPSPEED],
    *[(kind, 4, "llama", "LAMB") for kind in DEEPSPEED],
    *[("ddp", 2, "llama", "plain"), ("fsdp2", 2, "llama", "plain"), ("hsdp", 4, "llama", "SAM, LAMB, all")],
]
# These have each way of cutting up, each setting and each member of the family at least once; `make matrix` has all.
QUICK = [
    *[("ddp", 2, "gpt2", name) for name in SETTINGS],
    *[("fsdp2", 2, "gpt2", name) for name in SETTINGS | FAMILY],
    *[("zero1", 2, "gpt2", name) for name in OVERLAP],
    *[(kind, 2, "gpt2", name) for kind in ("zero1", "zero2", "deepspeed_zero3") for name in SOME],
    *[("hsdp", 4, "gpt2", name) for name in LATE],
    *[(kind, 2, "gpt2", "SAM, LAMB, all") for kind in DEEPSPEED],
    *[("zero1", 2, "gpt2", name) for name in ("LookSAM", "GSAM")],
    *[(kind, 4, "llama", name) for kind, name in [("fsdp2", "plain"), ("zero1", "SAM, LAMB, all")]],
    *[("deepspeed_zero2", 2, "gpt2", "SAM every 2"), ("deepspeed_zero3", 4, "llama", "LAMB")],
    *[("ddp", 2, "llama", "plain"), ("hsdp", 4, "llama", "SAM, LAMB, all")],
]


@lru_cache
def by_one_process(family: str, sam: str, optimizer: str, validates: bool) -> Trained:
    return run(1, train, "ddp", family, Settings(sam=sam, optimizer=optimizer, validates=validates))[0]


@pytest.mark.parametrize(
    ("kind", "world", "family", "name"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.matrix) for case in dict.fromkeys(CASES)],
)
def test_training_is_that_of_one_process(kind: str, world: int, family: str, name: str) -> None:
    """Losses, norms, weights and what the model writes are those of plain DDP at world 1, in float32: the order of sums
    over a batch is all that may differ, and grows a little by each step."""
    settings = SETTINGS_OF_ALL[name]
    expected = by_one_process(family, settings.sam, settings.optimizer, settings.validates)
    results = run(world, train, kind, family, settings)
    for result in results:
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
        assert result.norms == results[0].norms  # to the last bit, or ranks would part ways
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)
        assert result.validation == pytest.approx(expected.validation, rel=1e-6)
        assert result.text == expected.text
        assert result.params.keys() == expected.params.keys()
        for n, p in result.params.items():
            assert torch.equal(p, results[0].params[n])
            error = ((p - expected.params[n]).norm() / expected.params[n].norm()).item()
            assert error < 2e-5, n


def test_training_changes_what_it_should() -> None:
    """Lest the test above compare trainings that do nothing: SAM and the optimizer matter, the model learns."""
    plain, sam, lamb = (by_one_process("gpt2", s, o, False) for s, o in (("", "SGD"), ("SAM", "SGD"), ("", "LAMB")))
    assert plain.losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert plain.losses[0] == sam.losses[0] == lamb.losses[0]
    assert abs(sam.norms[0] - plain.norms[0]) > 1e-2
    assert len({round(result.losses[-1], 4) for result in (plain, sam, lamb)}) == 3


def validated_around_a_step(kind: str) -> list[float]:
    """The validation loss before and after a step whose gradient was there before both."""
    engine = ENGINES[kind]()
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt = SGD(model.parameters(), lr=1.0)
    backward(engine, model, [batch(0)])
    losses = [mean(validation_loss(engine, model, [batch(100)], CPU))]
    opt.step()
    return [*losses, mean(validation_loss(engine, model, [batch(100)], CPU))]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_a_forward_pass_sees_the_weights_of_the_moment(kind: str) -> None:
    """FSDP2 keeps whole copies after a forward pass that no backward pass follows: after the next step they are stale,
    and were used."""
    expected = run(1, validated_around_a_step, "ddp")[0]
    assert abs(expected[0] - expected[1]) > 1e-3
    for losses in run(2, validated_around_a_step, kind):
        assert losses == pytest.approx(expected, rel=1e-6)


def communicated(kind: str, micro_batches: int, options: dict[str, Any]) -> dict[str, int]:
    """How often a step gathers parameters and reduces gradients."""
    engine = ENGINES[kind](**options)
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    with Collectives() as mode:
        backward(engine, model, list(batch(0).chunk(micro_batches)))
    return {name: sum(name in operation for operation in mode.seen) for name in ("gather", "scatter", "allreduce")}


@pytest.mark.parametrize(
    ("kind", "world", "micro_batches", "options", "expected"),
    [
        # Two blocks and what is outside of them; a block's parameters twice, but for those that keep them.
        ("fsdp2", 2, 1, {}, {"gather": 5, "scatter": 3, "allreduce": 0}),
        ("zero2", 2, 1, {}, {"gather": 3, "scatter": 3, "allreduce": 0}),
        ("hsdp", 4, 1, {}, {"gather": 5, "scatter": 3, "allreduce": 3}),
        ("fsdp2", 2, 2, {}, {"gather": 10, "scatter": 6, "allreduce": 0}),
        ("fsdp2", 2, 2, {"sync_each_batch": False}, {"gather": 10, "scatter": 3, "allreduce": 0}),
        ("hsdp", 4, 2, {"sync_each_batch": False}, {"gather": 10, "scatter": 3, "allreduce": 3}),
    ],
)
def test_engines_communicate_as_often_as_they_say(
    kind: str, world: int, micro_batches: int, options: dict[str, Any], expected: dict[str, int]
) -> None:
    assert run(world, communicated, kind, micro_batches, options) == [expected] * world


# Precision.


def precision_on(kind: str, precision: str) -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """Losses, the dtypes in which blocks compute, and those of parameters, gradients and state."""
    engine = ENGINES[kind](precision=precision)
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt = distopt.AdamW(model.parameters(), lr=0.01)
    computed: set[torch.dtype] = set()
    for block in blocks(engine.unwrap(model)):
        block.mlp.c_fc.register_forward_hook(lambda module, args, output: computed.add(output.dtype))
    losses = [mean(update(engine, model, opt, [batch(step)], max_grad_norm=1.0).loss) for step in range(STEPS)]
    kept = {t.dtype for p in model.parameters() for t in (p, p.grad, *opt.state[p].values())}
    return losses, computed, kept


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("hsdp", 4)])
def test_bf16_computes_in_bfloat16_and_keeps_float32(kind: str, world: int) -> None:
    exact, computed, _ = run(world, precision_on, kind, "fp32")[0]
    assert computed == {torch.float32}
    for losses, computed, kept in run(world, precision_on, kind, "bf16"):
        assert computed == {torch.bfloat16}
        assert kept == {torch.float32}
        assert losses != exact
        assert losses == pytest.approx(exact, rel=5e-3)  # 8 bits


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_auto_is_float32_where_nothing_computes_bfloat16(engine: Callable[..., Engine]) -> None:
    assert engine(precision="auto").bf16 is torch.cuda.is_available()


# Activation checkpointing.


def forward_calls(kind: str, checkpointing: bool) -> list[int]:
    """How often each block's MLP runs in a step."""
    engine = ENGINES[kind](activation_checkpointing=checkpointing)
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    counts = [0, 0]

    def count(i: int) -> None:
        counts[i] += 1

    for i, block in enumerate(blocks(engine.unwrap(model))):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: count(i))
    backward(engine, model, [batch(0)])
    return counts


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_checkpointing_runs_each_block_again_in_the_backward_pass(kind: str) -> None:
    assert run(2, forward_calls, kind, False) == [[1, 1]] * 2
    assert run(2, forward_calls, kind, True) == [[2, 2]] * 2


# SAM and dropout.

DROPOUT = CONFIGS["gpt2"] | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


def two_passes(engine: Engine, model: nn.Module, rho: float, batches: list[Tensor], same_masks: bool) -> None:
    """SAM's gradient by hand: the second pass after the same draws, or after other ones."""
    params = list(model.parameters())
    state = torch.get_rng_state()
    backward(engine, model, batches)
    square = torch.stack([local(p.grad).square().sum() for p in params]).sum()
    if isinstance(engine, FSDP2):
        dist.all_reduce(square)
        square /= engine.replicas
    saved = [local(p).detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            local(p).add_(local(p.grad), alpha=rho / square.sqrt().item())
    model.zero_grad()
    if same_masks:
        torch.set_rng_state(state)
    backward(engine, model, batches)
    with torch.no_grad():
        for p, value in zip(params, saved):
            local(p).copy_(value)


def dropout_on(kind: str, way: str) -> dict[str, Tensor]:
    """The weights after a step of SAM, by `update` or by hand."""
    engine = ENGINES[kind](activation_checkpointing=way == "update, checkpointing")
    model = made(LanguageModel("gpt2", DROPOUT), engine)
    opt = SGD(model.parameters(), lr=1.0)
    torch.manual_seed(7 + dist.get_rank())
    batches = list(batch(0).chunk(2))
    if way.startswith("update"):
        update(engine, model, distopt.SAM(opt, rho=0.1), batches)
    else:
        two_passes(engine, model, 0.1, batches, same_masks=way == "by hand")
        opt.step()
    return full(model)


def masks_on(kind: str, checkpointing: bool) -> list[Tensor]:
    """What each dropout lets through in a step of SAM over two micro-batches, in order."""
    engine = ENGINES[kind](activation_checkpointing=checkpointing)
    model = made(LanguageModel("gpt2", DROPOUT), engine)
    opt = SGD(model.parameters(), lr=1.0)
    model = engine.attach(model, opt, 2, math.inf)
    masks: list[Tensor] = []
    for name, module in model.named_modules():
        # Where attention drops all that a token sees, there are zeros before the dropout that follows it.
        if isinstance(module, nn.Dropout) and "attn" not in name:
            module.register_forward_hook(lambda module, args, out: masks.append(out != 0))
    torch.manual_seed(7 + dist.get_rank())
    update(engine, model, distopt.SAM(opt, rho=0.1), list(batch(0).chunk(2)))
    return masks


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ENGINES)
def test_both_passes_of_sam_drop_the_same(kind: str, checkpointing: bool) -> None:
    """On every engine and rank; also where blocks run twice, and for each of two micro-batches."""
    for masks in run(2, masks_on, kind, checkpointing):
        half = len(masks) // 2
        assert half >= 6  # of the embedding, and of two blocks, in each of two micro-batches
        assert all(torch.equal(a, b) for a, b in zip(masks[:half], masks[half:], strict=True))
        assert not torch.equal(masks[0], masks[half // 2])
        assert 0.6 < torch.cat([mask.flatten() for mask in masks]).double().mean() < 0.8


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp2", 2)])
def test_both_passes_of_sam_see_the_same_dropout(kind: str, world: int) -> None:
    """The gradient at the worst point has to be that of the same function; also where blocks run twice."""

    def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-3)).item() for n in b)

    by_hand = run(world, dropout_on, kind, "by hand")[0]
    other = run(world, dropout_on, kind, "by hand, other masks")[0]
    assert differ(other, by_hand) > 1e-2
    for way in ("update", "update, checkpointing"):
        for result in run(world, dropout_on, kind, way):
            assert differ(result, by_hand) < 1e-5, way


class Normed(nn.Module):
    """Batch norm between two layers; its statistics are buffers that every forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def statistics_on(kind: str) -> tuple[list[float], list[float], int]:
    """The running means after each forward pass of a step of SAM, those after the step, and the passes counted."""
    torch.manual_seed(0)
    normed, engine = Normed(), ENGINES[kind]()
    norm, x = normed.norm, torch.randn(6, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    model = engine.build(normed, [normed.first], lambda unit, device: None, CPU)
    opt = SGD(engine.unwrap(model).parameters(), lr=0.1)
    model = engine.attach(model, opt, 1, math.inf)
    means: list[float] = []
    norm.register_forward_hook(lambda *_: means.append(float(norm.running_mean.sum())))
    sam = distopt.SAM(opt, rho=1.0, model=normed)
    assert update(engine, model, sam, [x], loss=lambda model, x, _: model(x).square().mean()).applied
    return means, [float(norm.running_mean.sum())], int(norm.num_batches_tracked)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_second_pass_of_sam_moves_no_statistics(kind: str) -> None:
    """DeepSpeed perturbs its partitions itself, and left a model's buffers as the second pass had moved them."""
    for (first, second), after, counted in run(2, statistics_on, kind):
        assert after == [first] != [second]
        assert counted == 1


def of_member(kind: str, name: str) -> None:
    engine = ENGINES[kind]()
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt = distopt.AdamW(model.parameters())
    model = engine.attach(model, opt, 1, 1.0)
    update(engine, model, MEMBERS_BUT_SAM[name](opt), [batch(0)])


MEMBERS_BUT_SAM = {name: make for name, make in SAMS.items() if make.func not in (distopt.SAM, of_two_radii)} | {
    "SAM with scope=local": partial(distopt.SAM, scope="local")
}


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_deepspeed_refuses_all_members_but_sam(kind: str) -> None:
    """At the first step too, where nobody has asked `check_sam`: it took SAM's step in their name."""
    for name, make in MEMBERS_BUT_SAM.items():
        with pytest.raises(RankError, match=rf"{make.func.__name__} with scope=\w+ does not run under DeepSpeed"):
            run(2, of_member, kind, name)


def alike(kind: str) -> list[Tensor]:
    """The weights after two steps, of which the second does not ascend."""
    engine = ENGINES[kind]()
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt = SGD(model.parameters(), lr=0.1)
    model = engine.attach(model, opt, 1, 1.0)
    sam = distopt.SAM(opt, scope="local", interval=2)
    for step in range(2):
        update(engine, model, sam, [batch(step)])
    return [p.detach() for p in engine.unwrap(model).parameters()]


def test_a_step_of_local_scope_that_does_not_ascend_is_by_the_mean_gradient() -> None:
    """Its one pass exchanged nothing: each rank took a step of its own, under ZeRO-1 with its own rows of it."""
    first, *others = [*run(2, alike, "ddp"), *run(2, alike, "zero1")]
    for params in others:  # float32; the order of sums over two ranks is the same
        assert max(float((p - q).norm() / q.norm()) for p, q in zip(params, first, strict=True)) < 1e-6


def test_a_step_with_sam_draws_as_often_as_one_without() -> None:
    """What comes after (data order, the next masks) does not depend on SAM."""
    one, other = run(1, draws_after, False)[0], run(1, draws_after, True)[0]
    assert torch.equal(one, other)


def draws_after(sam: bool) -> Tensor:
    engine = DDP()
    model = made(LanguageModel("gpt2", DROPOUT), engine)
    opt: torch.optim.Optimizer = SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    update(engine, model, distopt.SAM(opt) if sam else opt, [batch(0)])
    return torch.rand(4)


# Steps that are left out.


def overflowing(kind: str, sam: bool) -> tuple[bool, float, bool, int]:
    """A step whose gradient is not finite on one rank only, then a usual one."""
    engine = ENGINES[kind]()
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt: torch.optim.Optimizer = distopt.AdamW(model.parameters(), lr=0.01)
    opt = distopt.SAM(opt) if sam else opt
    before = full(model)
    scale = math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    handle = engine.unwrap(model).get_output_embeddings().register_forward_hook(lambda module, args, out: out * scale)
    done = update(engine, model, opt, [batch(0)], max_grad_norm=1.0)
    handle.remove()
    after = full(model)
    same = all(torch.equal(before[n], after[n]) for n in before)
    steps = [int(state["step"]) for state in opt.state.values()]
    usual = update(engine, model, opt, [batch(1)], max_grad_norm=1.0)
    assert usual.applied
    assert {int(state["step"]) for state in opt.state.values()} == {1}
    return done.applied, done.grad_norm, same, sum(steps)


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
@pytest.mark.parametrize("sam", [False, True], ids=["", "SAM"])
def test_a_gradient_that_is_not_finite_leaves_every_rank_as_it_was(kind: str, world: int, sam: bool) -> None:
    for applied, norm, same, steps in run(world, overflowing, kind, sam):
        assert not applied
        assert math.isnan(norm)
        assert same
        assert steps == 0


FAILING = list(ENGINES)


def with_sam(kind: str, precision: str) -> tuple[Engine, nn.Module, Any]:
    engine = ENGINES[kind](precision=precision)
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    opt = SGD(distopt.param_groups(model, weight_decay=0.1), lr=0.3, momentum=0.9)
    return engine, engine.attach(model, opt, 1, 1.0), distopt.SAM(opt, rho=0.1)


def held(engine: Engine, model: nn.Module, sam: Any) -> list[Tensor]:
    """What a step could have moved: weights (masters, under DeepSpeed), state, and the loss by the model's weights."""
    loss = validation_loss(engine, model, [batch(100)], CPU).detach().clone()
    stepped = [local(p).detach().clone() for p in sam.layout.segments]
    state = [local(v).clone() for s in sam.state.values() for _, v in sorted(s.items()) if isinstance(v, Tensor)]
    return [loss, *full(model).values(), *stepped, *state]


def spoiling(engine: Engine, model: nn.Module, which: int, spoil: Callable[[Tensor], Tensor]) -> Any:
    """Does that to the logits of this rank's pass of that number, if it is the last rank; 0 for none."""
    calls: list[None] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(None)
        return spoil(out) if len(calls) == which and dist.get_rank() == dist.get_world_size() - 1 else out

    return engine.unwrap(model).get_output_embeddings().register_forward_hook(hook)


def around_a_bad_step(kind: str, precision: str, which: int) -> tuple[list[bool], bool, list[Tensor]]:
    """Whether three steps were applied, the second with nan in one pass; whether it left all as it was; the end."""
    engine, model, sam = with_sam(kind, precision)
    applied = [update(engine, model, sam, [batch(0)], 1.0).applied]
    before = held(engine, model, sam)
    if which:
        handle = spoiling(engine, model, which, lambda out: out * math.nan)
        done = update(engine, model, sam, [batch(1)], 1.0)
        handle.remove()
        assert math.isnan(done.grad_norm)
        applied.append(done.applied)
    after = held(engine, model, sam)
    same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    applied.append(update(engine, model, sam, [batch(2)], 1.0).applied)
    return applied, same, held(engine, model, sam)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*[(kind, "fp32") for kind in FAILING], *[(kind, "bf16") for kind in DEEPSPEED]],
)
def test_nan_in_either_pass_of_sam_leaves_every_rank_as_it_was(kind: str, precision: str) -> None:
    """Weights, masters and state, and the next step is as if there had been none in between."""
    expected = [end for _, _, end in run(2, around_a_bad_step, kind, precision, 0)]
    for which in (1, 2):
        for rank, (applied, same, end) in enumerate(run(2, around_a_bad_step, kind, precision, which)):
            assert applied == [True, False, True]
            assert same
            assert all(torch.equal(a, b) for a, b in zip(end, expected[rank]))


class Stop(Exception):
    pass


def around_an_exception(kind: str, raises: str) -> tuple[bool, list[Tensor]]:
    """Whether all is as before after a second pass, or an ascent, that raised on every rank; the end, one step later.

    The ascent raises at the second param group, when the first has moved.
    """
    engine, model, sam = with_sam(kind, "fp32")
    update(engine, model, sam, [batch(0)], 1.0)
    before = held(engine, model, sam)
    calls: list[None] = []

    def stop(module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise Stop

    if raises == "ascent":
        asked: list[None] = []

        def radius(group: dict[str, Any]) -> float:
            asked.append(None)
            if len(asked) == 4:  # both groups were asked for before it
                raise Stop
            return type(sam).radius(sam, group)

        sam.radius = radius  # type: ignore[method-assign]
        with pytest.raises(Stop):
            update(engine, model, sam, [batch(1)], 1.0)
        del sam.radius
    elif raises:
        handle = engine.unwrap(model).get_output_embeddings().register_forward_hook(stop)
        with pytest.raises(Stop):
            update(engine, model, sam, [batch(1)], 1.0)
        handle.remove()
    after = held(engine, model, sam)
    same = all(torch.equal(a, b) for a, b in zip(before, after))
    update(engine, model, sam, [batch(2)], 1.0)
    return same, held(engine, model, sam)


@pytest.mark.parametrize("kind", FAILING)
def test_an_exception_in_sams_second_pass_leaves_the_weights(kind: str) -> None:
    """FSDP2 still held the perturbed weights, and the next pass used them."""
    calm = [end for _, end in run(2, around_an_exception, kind, "")]
    for rank, (same, end) in enumerate(run(2, around_an_exception, kind, "second pass")):
        assert same
        assert all(torch.equal(a, b) for a, b in zip(end, calm[rank], strict=True))


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_an_exception_in_sams_ascent_leaves_the_weights(kind: str) -> None:
    """It is a step of DeepSpeed's, which left one param group of two moved, and the optimizer without the other."""
    calm = [end for _, end in run(2, around_an_exception, kind, "")]
    for rank, (same, end) in enumerate(run(2, around_an_exception, kind, "ascent")):
        assert same
        assert all(torch.equal(a, b) for a, b in zip(end, calm[rank], strict=True))


def losses_in_bf16(kind: str, sam: str) -> list[float]:
    engine, model, stepper = with_sam(kind, "bf16")
    stepper = SAMS[sam](stepper.optimizer) if sam else stepper.optimizer
    return [mean(update(engine, model, stepper, [batch(step)], 1.0).loss) for step in range(STEPS)]


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_sam_in_bf16_under_deepspeed_is_near_float32s(kind: str) -> None:
    """8 bits; SAM's own effect on the loss is larger than that tolerance."""
    exact, plain = (by_one_process("gpt2", sam, "SGD", False).losses for sam in ("SAM", ""))
    for losses in run(2, losses_in_bf16, kind, "SAM"):
        assert losses == pytest.approx(exact, rel=5e-3)
        assert losses != exact
    assert plain != pytest.approx(exact, rel=5e-3)


def warnings_of(kind: str, rho: float) -> list[str]:
    """Of three steps in bfloat16."""
    engine, model, sam = with_sam(kind, "bf16")
    sam.rho, sam.compute_dtype = rho, torch.bfloat16  # as the job does
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(3):
            update(engine, model, sam, [batch(step)], 1.0)
    return [str(warning.message) for warning in told if "SAM's perturbation is lost" in str(warning.message)]


@pytest.mark.parametrize("kind", ["ddp", *DEEPSPEED])
def test_a_perturbation_that_bf16_rounds_away_is_warned_of_once(kind: str) -> None:
    """DeepSpeed's ascent measured nothing. The numbers are DDP's, of other weights, but noise of the same size."""
    (expected, *_), *_ = run(2, warnings_of, "ddp", 1e-5)
    for told in run(2, warnings_of, kind, 1e-5):
        assert len(told) == 1
        (length, cosine), (length_ddp, cosine_ddp) = (
            re.search(r"of length ([\d.e-]+) at a cosine of ([\d.]+)", text).groups() for text in (told[0], expected)
        )
        assert float(length) == pytest.approx(float(length_ddp), rel=0.25)
        assert float(cosine) == pytest.approx(float(cosine_ddp), abs=0.03)
    assert run(2, warnings_of, kind, 0.2) == [[]] * 2


# Building.


def initial_of(kind: str, family: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())  # what was drawn before does not matter
    return full(made(LanguageModel(family, CONFIGS[family], seed=seed), ENGINES[kind]()))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_first_weights_are_the_same_on_every_engine_and_world(family: str) -> None:
    """Also those that the family's own initialisation scales by depth; another seed gives others."""
    expected = run(1, initial_of, "ddp", family, 0)[0]
    for kind, world in [("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 4), ("zero2", 2), ("hsdp", 4)]:
        for params in run(world, initial_of, kind, family, 0):
            assert params.keys() == expected.keys()
            assert all(torch.equal(p, expected[n]) for n, p in params.items()), (kind, world)
    other = run(1, initial_of, "ddp", family, 1)[0]
    random = {n for n, p in expected.items() if p.std() > 0}
    assert {n for n in expected if not torch.equal(other[n], expected[n])} == random
    values = [p for n, p in expected.items() if n in random]
    assert not any(torch.equal(p, q) for i, p in enumerate(values) for q in values[:i] if p.shape == q.shape)


def drawn_by_transformers(family: str) -> dict[str, tuple[float, float]]:
    from transformers import AutoModelForCausalLM

    config = LanguageModel(family, CONFIGS[family]).describe(VOCABULARY)
    return {
        n: (p.mean().item(), p.std().item()) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_the_first_weights_are_distributed_as_the_family_draws_them(family: str) -> None:
    """Means and standard deviations of at least 1000 numbers; a c_proj of gpt2 has half the deviation of a c_fc."""
    ours = run(1, initial_of, "ddp", family, 0)[0]
    theirs = run(1, drawn_by_transformers, family)[0]
    assert ours.keys() == theirs.keys()
    for name, (average, deviation) in theirs.items():
        assert ours[name].mean().item() == pytest.approx(average, abs=0.15 * deviation), name
        assert ours[name].std().item() == pytest.approx(deviation, rel=0.1), name


def peaks(kind: str, family: str) -> tuple[list[int], list[int], list[int]]:
    """Bytes in use when a unit has been filled, for each; those of the unit, and of the shards of the units before."""
    language_model = LanguageModel(family, CONFIGS[family] | BIG[family])
    used, units, shards = [], [], []
    gc.collect()
    gc.freeze()  # what there is already is not looked at

    def fill(unit: nn.Module, device: torch.device) -> None:
        shards.append(sum(size(local(p)) for p in model.parameters() if isinstance(p, DTensor)))
        language_model.fill(model, unit, device)
        units.append(sum(size(p) for p in unit.parameters() if not p.is_meta and not isinstance(p, DTensor)))
        gc.collect()
        used.append(in_use())

    model = language_model.empty(language_model.describe(VOCABULARY))
    ENGINES[kind]().build(model, blocks(model), fill, CPU)
    gc.unfreeze()
    return used, units, shards


BIG = {"gpt2": {"n_layer": 6}, "llama": {"num_hidden_layers": 6}}


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def in_use() -> int:
    """The bytes of all tensors, a storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = local(thing.detach()).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 4), ("hsdp", 4)])
def test_no_rank_ever_holds_more_than_one_whole_unit(kind: str, world: int, family: str) -> None:
    """When a unit has just got its values, the blocks before it are shards already. A model as large as all ranks'
    memory would not start otherwise."""
    for used, units, shards in run(world, peaks, kind, family):
        assert len(used) == 7
        share = 4 if kind == "fsdp2" else 2
        total = sum(units)
        for now, unit, before in zip(used, units, shards):
            slack = 4096  # rotary tables, and shards that are padded to the same length
            assert before <= total / share + slack
            assert unit + before <= now <= unit + before + slack
        assert max(used) < 0.6 * total  # or the test says nothing


# Pretrained folders.


def save(
    folder: Path, family: str, changes: dict[str, Any], shard_bytes: int, head: bool, dtype: str
) -> dict[str, Tensor]:
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(11)
    config = LanguageModel(family, CONFIGS[family] | changes).describe(VOCABULARY)
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()  # no zeros or ones that would come by themselves
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return {n: p.detach().float() for n, p in model.named_parameters()}


def load(folder: Path, kind: str) -> dict[str, Tensor]:
    return full(made(LanguageModel(path=str(folder)), ENGINES[kind]()))


@pytest.mark.parametrize(
    ("family", "changes", "shard_bytes", "head", "dtype"),
    [
        ("gpt2", {}, 10**9, True, "float32"),
        ("gpt2", {}, 20_000, True, "bfloat16"),
        ("gpt2", {}, 10**9, False, "float32"),
        ("llama", {}, 10**9, True, "float32"),
        ("llama", {}, 10_000, True, "float32"),
        ("llama", {"tie_word_embeddings": True}, 10**9, True, "float32"),
    ],
    ids=["gpt2", "gpt2 in files, bfloat16", "gpt2 without head", "llama", "llama in files", "llama, tied"],
)
def test_a_pretrained_folder_gives_exactly_its_weights(
    tmp_path: Path, family: str, changes: dict[str, Any], shard_bytes: int, head: bool, dtype: str
) -> None:
    (saved,) = run(1, save, tmp_path, family, changes, shard_bytes, head, dtype)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard_bytes < 10**9)
    prefix = "" if head else "transformer."
    for kind, world in [("ddp", 1), ("fsdp2", 2), ("hsdp", 4)]:
        for params in run(world, load, tmp_path, kind):
            assert params.keys() == {prefix + n for n in saved}
            assert all(torch.equal(params[prefix + n], p) for n, p in saved.items()), (kind, world)


def spoil(folder: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    if what == "missing":
        del weights[name]
    else:
        weights[name] = weights[name].t().contiguous()
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"has no weights for transformer\.h\.1\.mlp\.c_fc\.weight"),
        (
            "shape",
            r"transformer\.h\.1\.mlp\.c_fc\.weight is \[128, 32\] in .*model\.safetensors, \[32, 128\] in the model",
        ),
    ],
)
@pytest.mark.parametrize(("kind", "world"), [("ddp", 1), ("fsdp2", 2)])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, what: str, message: str, kind: str, world: int) -> None:
    run(1, save, tmp_path, "gpt2", {}, 10**9, True, "float32")
    run(1, spoil, tmp_path, what)
    with pytest.raises(RankError) as error:
        run(world, load, tmp_path, kind)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


def untied_without_head(folder: Path) -> None:
    save(folder, "llama", {}, 10**9, False, "float32")
    load(folder, "ddp")


def too_many_tokens(folder: Path) -> None:
    save(folder, "gpt2", {}, 10**9, True, "float32")
    LanguageModel(path=str(folder)).describe(VOCABULARY + 1)


def no_weights(folder: Path) -> None:
    save(folder, "gpt2", {}, 10**9, True, "float32")
    (folder / "model.safetensors").unlink()
    LanguageModel(path=str(folder))


def no_such_family(folder: Path) -> None:
    LanguageModel("gpt22").describe(VOCABULARY)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (untied_without_head, r"has no weights for lm_head\.weight"),
        (too_many_tokens, r"the data has 62 tokens, the model in .* only 61: set data\.tokenizer to the model's own"),
        (no_weights, r"model\.path=.*: no model\.safetensors there"),
        (no_such_family, r"model\.family=gpt22 is no model type of transformers; gpt2 is one"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_no_model_is_refused(tmp_path: Path, what: Callable[[Path], None], message: str) -> None:
    with pytest.raises(RankError) as error:
        run(1, what, tmp_path)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.path=.*no config\.json there; give a folder written by save_pretrained"
    ):
        LanguageModel(path=str(tmp_path))


# What engines refuse.


@pytest.mark.parametrize("engine", [DDP, FSDP2])
@pytest.mark.parametrize("precision", ["fp16", "bfloat16", "", None])
def test_unknown_precisions_are_refused(engine: type[Engine], precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"engine\.precision must be one of auto, fp32, bf16, got {precision!r}"):
        engine(precision=precision)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_more_processes_than_gpus_are_refused(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    message = r"3 processes on a machine with 2 GPUs: launch with --num_processes 2$"
    with pytest.raises(ValueError, match=message):
        engine().start()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_bf16_is_refused_on_a_gpu_that_has_none(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that emulates it, as torch's `is_bf16_supported()` allows, is none that computes in it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match=r"engine\.precision=bf16: Tesla T4 has no bfloat16; use fp32$"):
        engine(precision="bf16")
    assert not engine(precision="auto").bf16 and not engine(precision="fp32").bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert engine(precision="auto").bf16 and engine(precision="bf16").bf16


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_deepspeed_the_install_is_named(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from distopt.engine import deepspeed

    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed is not installed: pip install 'distopt\[deepspeed\]'$"):
        deepspeed.DeepSpeed(stage=stage)


@pytest.mark.parametrize("replicas", [0, -1, 1.5, "2", None])
def test_bad_numbers_of_replicas_are_refused(replicas: Any) -> None:
    with pytest.raises(ValueError, match=rf"engine\.replicas must be an integer >= 1, got {replicas!r}"):
        FSDP2(replicas=replicas)


@pytest.mark.parametrize(("replicas", "world"), [(2, 1), (2, 3), (3, 4), (4, 2)])
def test_replicas_that_do_not_divide_the_processes_are_refused(replicas: int, world: int) -> None:
    with pytest.raises(ValueError, match=rf"engine\.replicas={replicas} does not divide the {world} processes"):
        FSDP2(replicas=replicas).check(world)
    FSDP2(replicas=replicas).check(replicas * world)


def classes(kind: str) -> tuple[int, set[str]]:
    """How many units are sharded, and how parameters lie."""
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), ENGINES[kind]())
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    return units, {str(getattr(p, "placements", "plain")) for p in model.parameters()}


def test_every_engine_shards_what_its_name_says() -> None:
    assert run(2, classes, "ddp") == [(0, {"plain"})] * 2
    assert run(2, classes, "fsdp2") == [(3, {"(Shard(dim=0),)"})] * 2
    assert run(2, classes, "zero2") == [(3, {"(Shard(dim=0),)"})] * 2
    assert run(4, classes, "hsdp") == [(3, {"(Replicate(), Shard(dim=0))"})] * 4
