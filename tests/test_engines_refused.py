"""What engines refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distopt.engine import DDP, FSDP2, Engine
from tests.harness.engines import (
    ENGINES,
)


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
