"""Engines and SAM: both passes drop the same, draw as one pass does and move no statistics."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.engine import DDP, FSDP2, Engine
from distopt.engine.train_step import backward, update
from distopt.layout import local
from distopt.models.language_model import LanguageModel
from distopt.optim import SGD
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    DEEPSPEED,
    ENGINES,
    batch,
    full,
    made,
)
from tests.harness.language_models import SAMS, of_two_radii

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


DROPPING = [("ddp", True), ("fsdp2", True), ("zero1", False), ("deepspeed_zero3", False)]


@pytest.mark.parametrize(("kind", "checkpointing"), some(DROPPING, itertools.product(ENGINES, [False, True])))
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
