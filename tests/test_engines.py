"""Engines: DDP, FSDP2, HSDP and DeepSpeed train real language models as one process does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distopt
from benchmarks.collectives import Collectives
from distopt.engine import Engine
from distopt.engine.train_step import backward, update
from distopt.job.evaluate import validation_loss
from distopt.models.language_model import LanguageModel, blocks
from distopt.optim import SGD
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    DEEPSPEED,
    ENGINES,
    STEPS,
    VOCABULARY,
    batch,
    made,
    mean,
)
from tests.harness.language_models import PLAIN, SAMS, Settings, by_one_process, train

# The same training.

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
# These have each engine, each setting and each member of the family at least once; `make matrix` has all.
QUICK = [
    *[(kind, 2, "gpt2", name) for kind in ("ddp", "zero1") for name in SOME],
    *[("ddp", 2, "gpt2", name) for name in ("micro-batches", "checkpointing", "SAM")],
    *[("fsdp2", 2, "gpt2", name) for name in ("LAMB", "micro-batches, one exchange", *SOME)],
    *[("fsdp2", 2, "gpt2", name) for name in FAMILY],
    *[("zero1", 2, "gpt2", name) for name in OVERLAP],
    *[(kind, 2, "gpt2", "SAM, LAMB, all") for kind in ("zero2", *DEEPSPEED)],
    ("hsdp", 4, "gpt2", "SAM, all, one exchange"),
    ("zero1", 2, "gpt2", "LookSAM"),
    *[(kind, 4, "llama", name) for kind, name in [("fsdp2", "plain"), ("zero1", "SAM, LAMB, all")]],
    *[("deepspeed_zero2", 2, "gpt2", "SAM every 2"), ("deepspeed_zero3", 4, "llama", "LAMB")],
    *[("ddp", 2, "llama", "plain"), ("hsdp", 4, "llama", "SAM, LAMB, all")],
]


@pytest.mark.parametrize(("kind", "world", "family", "name"), some(QUICK, dict.fromkeys(CASES)))
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
    """FSDP2 keeps full copies after a forward pass that no backward pass follows: after the next step they are stale,
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
        ("fsdp2", 2, 1, {}, {"gather": 4, "scatter": 3, "allreduce": 0}),
        ("zero2", 2, 1, {}, {"gather": 3, "scatter": 3, "allreduce": 0}),
        ("hsdp", 4, 1, {}, {"gather": 4, "scatter": 3, "allreduce": 3}),
        ("fsdp2", 2, 2, {}, {"gather": 8, "scatter": 6, "allreduce": 0}),
        ("fsdp2", 2, 2, {"sync_each_batch": False}, {"gather": 8, "scatter": 3, "allreduce": 0}),
        ("hsdp", 4, 2, {"sync_each_batch": False}, {"gather": 8, "scatter": 3, "allreduce": 3}),
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


BF16 = [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("hsdp", 4)]


@pytest.mark.parametrize(("kind", "world"), some([("ddp", 2), ("hsdp", 4)], BF16))
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
