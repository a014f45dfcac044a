"""What a script does wrong, and what `distopt.attach` says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distopt
from tests.harness.accelerated import STEPS, batch, lamb, prepared, start, start_deepspeed, start_fsdp
from tests.harness.distributed import RankError, run
from tests.harness.sharded import whole


def ask(zero: Any) -> None:
    prepared(start(), zero)


def ask_fsdp2(zero: Any, reshard: bool) -> None:
    prepared(start_fsdp(reshard), zero)


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")  # FSDP1 is deprecated
    accelerator = start()
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    distopt.attach(accelerator, *accelerator.prepare(model, distopt.LAMB(model.parameters())))


def single_processes() -> None:
    rank = os.environ.pop("LOCAL_RANK")
    world = os.environ.pop("WORLD_SIZE")
    try:
        prepared(start(), None)
    finally:
        os.environ.update(LOCAL_RANK=rank, WORLD_SIZE=world)


def torch_optimizer() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    distopt.attach(accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters())), zero_stage=1)


def other_parameters() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    distopt.attach(accelerator, *accelerator.prepare(model, lamb(nn.Linear(4, 4))))


def unprepared() -> None:
    model = nn.Linear(4, 4)
    distopt.attach(start(), model, lamb(model))


def twice() -> None:
    accelerator = start()
    model, optimizer, _ = prepared(accelerator, 1)
    distopt.attach(accelerator, model, optimizer, zero_stage=1)


def inside() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    _, optimizer = accelerator.prepare(model, lamb(model))
    distopt.attach(accelerator, model, optimizer)


def stepped_fsdp2() -> None:
    accelerator, model = start_fsdp(), nn.Linear(4, 4)
    optimizer = lamb(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    distopt.attach(accelerator, *accelerator.prepare(model, optimizer))


def two_models() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    model, _, optimizer = accelerator.prepare(model, nn.Linear(4, 4), lamb(model))
    distopt.attach(accelerator, model, optimizer)


def another_model_later() -> None:
    accelerator = start()
    prepared(accelerator, 1)
    accelerator.prepare(nn.Linear(4, 4))
    accelerator.save_state("never")


def save_in_mid_step() -> None:
    accelerator = start()
    model, _, _ = prepared(accelerator, 1)
    with accelerator.accumulate(model):
        accelerator.backward(model(batch(0), 0))
        accelerator.save_state("never")


REFUSED: list[tuple[Callable[..., None], tuple[Any, ...], str]] = [
    (ask, (3,), r"zero_stage=3 was asked, Accelerate prepared DDP: .* silently drops"),
    (ask, (2,), r"zero_stage=2 was asked, Accelerate prepared DDP"),
    (ask, (4,), r"zero_stage must be None, 0, 1, 2 or 3, got 4"),
    (ask, (True,), r"got True"),
    (ask_fsdp2, (1, True), r"zero_stage=1 was asked, Accelerate prepared FSDP2 .* zero_stage=3"),
    (ask_fsdp2, (2, True), r"reshard_after_forward=True"),
    (ask_fsdp2, (3, False), r"reshard_after_forward=False"),
    (fsdp1, (), r"FSDP1.*fsdp_version=2"),
    (single_processes, (), r"2 processes were launched, Accelerate runs 1"),
    (torch_optimizer, (), r"zero_stage=1 needs an optimizer of distopt, got AdamW"),
    (other_parameters, (), r"2 of the 2 parameters of the optimizer are not the model's"),
    (unprepared, (), r"after accelerator\.prepare"),
    (twice, (), r"call attach once"),
    (inside, (), r"Linear on 2 processes"),
    (stepped_fsdp2, (), r"has stepped before accelerator\.prepare"),
    (two_models, (), r"2 models and 1 optimizers"),
    (another_model_later, (), r"2 models and 1 optimizers"),
    (save_in_mid_step, (), r"between the micro-batches"),
]


@pytest.mark.parametrize(("script", "args", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused(script: Callable[..., None], args: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=message) as error:
        run(2, in_folder, tmp_path, script, args)
    assert error.value.kind == "ValueError"
    assert "\n" not in error.value.message


def in_folder(folder: Path, script: Callable[..., None], args: tuple[Any, ...]) -> None:
    before = os.getcwd()
    os.chdir(folder)
    try:
        script(*args)
    finally:
        os.chdir(before)


def sharded_by_hand() -> None:
    """At two processes DDP refuses it."""
    from torch.distributed.fsdp import fully_shard

    rank = os.environ.pop("LOCAL_RANK")
    try:
        accelerator = start()
        model = fully_shard(nn.Linear(4, 4))
        distopt.attach(accelerator, *accelerator.prepare(model, lamb(model)))
    finally:
        os.environ.update(LOCAL_RANK=rank)


def test_a_model_that_was_sharded_by_hand_is_refused() -> None:
    with pytest.raises(RankError, match="sharded by hand"):
        run(1, sharded_by_hand)


def schedule_warnings(split_batches: bool) -> tuple[list[str], int]:
    from accelerate import DataLoaderConfiguration

    accelerator = start(dataloader_config=DataLoaderConfiguration(split_batches=split_batches))
    model = whole("replicated")
    inner = lamb(model)
    model, optimizer, schedule = accelerator.prepare(
        model, inner, distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distopt.attach(accelerator, model, optimizer)
    with accelerator.accumulate(model), accelerator.accumulate(model):
        accelerator.backward(model(batch(0), 0))
        optimizer.step()
        schedule.step()
    return [f"{w.category.__name__}: {w.message}" for w in caught], schedule.scheduler.last_epoch


def test_a_schedule_that_steps_once_per_process_is_warned_of() -> None:
    for messages, steps in run(2, schedule_warnings, False):
        assert [message[:54] for message in messages] == ["UserWarning: the scheduler was prepared, so Accelerate"]
        assert "steps it 2 times" in messages[0]
        assert steps == 2
    assert run(2, schedule_warnings, True) == [([], 1)] * 2
    assert run(1, schedule_warnings, False) == [([], 1)]


def refused_deepspeed() -> list[str]:
    """Another stage asked; SAM; offload, for which Accelerate puts DeepSpeed's own Adam in place of ours."""
    messages = []
    for wrap, zero, offload in ((None, 3, False), (distopt.SAM, 2, False), (None, 2, True)):
        accelerator = start_deepspeed(2, **({"offload_optimizer": {"device": "cpu"}} if offload else {}))
        import deepspeed.ops.adam

        class DeepSpeedCPUAdam(torch.optim.Adam):  # the real one is compiled, for minutes
            def __init__(self, params: Any, adamw_mode: bool, **kwargs: Any) -> None:
                super().__init__(params, **kwargs)

        real = deepspeed.ops.adam.DeepSpeedCPUAdam
        deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam
        model = whole("replicated", torch.float32)
        optimizer = lamb(model) if wrap is None else wrap(lamb(model))
        try:
            distopt.attach(accelerator, *accelerator.prepare(model, optimizer), zero_stage=zero)
        except ValueError as error:
            messages.append(str(error))
        finally:
            deepspeed.ops.adam.DeepSpeedCPUAdam = real
    return messages


def test_refused_with_deepspeed() -> None:
    for messages in run(2, refused_deepspeed):
        stage, sam, offload = messages
        assert "zero_stage=3 was asked, Accelerate prepared DeepSpeed at stage 2" in stage
        assert "SAM cannot see" in sam
        assert "DeepSpeed steps DeepSpeedCPUAdam" in offload and "zero_force_ds_cpu_optimizer=false" in offload
