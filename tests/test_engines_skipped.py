"""Engines: steps that are skipped, and passes that raise, leave every rank as it was."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.engine import Engine
from distopt.engine.train_step import update
from distopt.job.evaluate import validation_loss
from distopt.layout import local
from distopt.models.language_model import LanguageModel
from distopt.optim import SGD
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    DEEPSPEED,
    ENGINES,
    STEPS,
    batch,
    full,
    made,
    mean,
)
from tests.harness.language_models import SAMS, by_one_process


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


OVERFLOWING = list(itertools.product([("ddp", 2), ("fsdp2", 2), ("hsdp", 4)], [False, True]))


@pytest.mark.parametrize(("where", "sam"), some([(("fsdp2", 2), True), (("hsdp", 4), False)], OVERFLOWING))
def test_a_gradient_that_is_not_finite_leaves_every_rank_as_it_was(where: tuple[str, int], sam: bool) -> None:
    kind, world = where
    for applied, norm, same, steps in run(world, overflowing, kind, sam):
        assert not applied
        assert math.isnan(norm)
        assert same
        assert steps == 0


# The others reshard, or share their state, as one of these does.
QUICK = ["zero1", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]


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
    some(
        [*[(kind, "fp32") for kind in QUICK if kind != "deepspeed_zero3"], ("deepspeed_zero3", "bf16")],
        [*[(kind, "fp32") for kind in ENGINES], *[(kind, "bf16") for kind in DEEPSPEED]],
    ),
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


@pytest.mark.parametrize("kind", some(QUICK[:3], ENGINES))
def test_an_exception_in_sams_second_pass_leaves_the_weights(kind: str) -> None:
    """FSDP2 still held the perturbed weights, and the next pass used them."""
    calm = [end for _, end in run(2, around_an_exception, kind, "")]
    for rank, (same, end) in enumerate(run(2, around_an_exception, kind, "second pass")):
        assert same
        assert all(torch.equal(a, b) for a, b in zip(end, calm[rank], strict=True))


@pytest.mark.parametrize("kind", some(["deepspeed_zero1", "deepspeed_zero3"], DEEPSPEED))
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


@pytest.mark.parametrize("kind", some(["deepspeed_zero1", "deepspeed_zero3"], DEEPSPEED))
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


@pytest.mark.parametrize("kind", some(["deepspeed_zero1", "deepspeed_zero3"], ["ddp", *DEEPSPEED]))
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
