"""The Trainer under DDP, FSDP2 and DeepSpeed as it sets them up: updates are the unsharded ones, resumed or not."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from tests.harness.distributed import RankError, run
from tests.harness.trainers import SETUPS, error, sequences, trainer, whole

STEPS, STOP = 4, 2
# float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5
LAMB = {"optimizer_cls_and_kwargs": (distopt.LAMB, {"lr": 0.02})}
SGD = {"optimizer_cls_and_kwargs": (distopt.SGD, {"lr": 0.3, "momentum": 0.9})}
# The gradient of a key's bias is zero but for rounding, which a small eps would blow up to a whole step.
ADAMW = {"optimizer_cls_and_kwargs": (distopt.AdamW, {"lr": 0.02, "eps": 1e-4})}
SAM = {"sam": partial(distopt.SAM, rho=0.1)}
LOOK = {"sam": partial(distopt.LookSAM, rho=0.1, interval=3)}
OPTIONS: dict[str, dict[str, Any]] = {"lamb": LAMB, "adamw": ADAMW, "sam_lamb": LAMB | SAM, "looksam_sgd": SGD | LOOK}


def trained(folder: Path, setup: str, options: str, resume: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters after a run, and after another one that resumes from its checkpoint of step `STOP`."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": STOP} if resume else {}
    made = trainer(folder, setup, STEPS, OPTIONS[options], gradient_accumulation_steps=2, **saving)
    made.train()
    unbroken = whole(made)
    if not resume:
        return unbroken, []
    again = trainer(folder, setup, STEPS, OPTIONS[options], gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
    assert again.state.global_step == STEPS
    return unbroken, whole(again)


@lru_cache
def alone(options: str) -> list[Tensor]:
    """One process, without accumulation of ours: the same Trainer."""
    return run(1, in_one, options)[0]


def in_one(options: str) -> list[Tensor]:
    made = trainer(Path("unused"), "ddp", STEPS, OPTIONS[options])
    made.train()
    return whole(made)


def test_the_trainer_alone_is_the_optimizer_alone() -> None:
    """LAMB written out beside it: a plain model, whole batches, the Trainer's groups and schedule."""
    from tests.harness.trainers import language_model

    model = language_model()
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim > 1]
    others = [p for name, p in named.items() if p.ndim <= 1]
    optimizer = distopt.LAMB([{"params": decayed, "weight_decay": 0.0}, {"params": others}], lr=0.02, weight_decay=0.0)
    for step, batch in enumerate(sequences(STEPS).chunk(STEPS)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / STEPS)
        optimizer.step()
    (params,) = run(1, in_order)
    assert error(params, list(named.values())) < TOLERANCE


def in_order() -> list[Tensor]:
    made = trainer(Path("unused"), "ddp", STEPS, LAMB, train_sampling_strategy="sequential", lr_scheduler_type="linear")
    made.train()
    return whole(made)


CASES = [
    pytest.param(setup, options, marks=() if (setup, options) in QUICK else pytest.mark.matrix)
    for QUICK in [
        {
            ("ddp", "lamb"),
            ("fsdp2_sharded", "looksam_sgd"),
            ("deepspeed3", "lamb"),
        }
    ]
    for setup in SETUPS
    for options in OPTIONS
    if not ("deepspeed" in setup and "sam" in options)
]


@pytest.mark.parametrize(("setup", "options"), CASES)
def test_two_processes_train_and_resume_as_one_trains(tmp_path: Path, setup: str, options: str) -> None:
    for unbroken, resumed in run(2, trained, tmp_path, setup, options, True):
        assert error(unbroken, alone(options)) < TOLERANCE
        assert error(resumed, unbroken) < 1e-6  # the same sums in the same order, but for what a file rounds
    # Two steps from the start, without what the checkpoint holds, end elsewhere.
    assert error(in_one_from_scratch(options), alone(options)) > 100 * TOLERANCE


@lru_cache
def in_one_from_scratch(options: str) -> list[Tensor]:
    return run(1, short, options)[0]


def short(options: str) -> list[Tensor]:
    made = trainer(Path("unused"), "ddp", STOP, OPTIONS[options])
    made.train()
    return whole(made)


def sam_under_deepspeed() -> None:
    trainer(Path("unused"), "deepspeed2", STEPS, LAMB | SAM).train()


def test_sam_under_deepspeed_is_refused() -> None:
    with pytest.raises(RankError) as raised:
        run(2, sam_under_deepspeed)
    assert raised.value.kind == "ValueError" and "SAM cannot see the gradients that DeepSpeed keeps" in str(
        raised.value
    )


def each_for_itself() -> None:
    """As Accelerate does on the CPU when it is not told that it is one."""
    from transformers import Trainer, TrainingArguments

    from distopt.integrations.transformers import ShardedTrainerMixin
    from tests.harness.trainers import language_model, reset

    class Ours(ShardedTrainerMixin, Trainer):
        pass

    reset()
    args = TrainingArguments("unused", report_to=[], disable_tqdm=True, ddp_find_unused_parameters=False)
    data = [{"input_ids": row, "labels": row} for row in sequences(1)]
    Ours(language_model(), args, train_dataset=data, **LAMB).train()


def test_processes_that_each_train_for_themselves_are_refused() -> None:
    with pytest.raises(RankError) as raised:
        run(2, each_for_itself)
    assert raised.value.kind == "ValueError"
    assert "2 processes were launched, Accelerate runs 1, each for itself" in str(raised.value)
