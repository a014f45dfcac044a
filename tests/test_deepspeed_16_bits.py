"""Models of 16 bits under DeepSpeed, stepped by float32 masters."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distopt
from tests.harness.cells import some
from tests.harness.deepspeed import MAX_NORM, STEPS, TOLERANCE, batch, reference, start
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance, named
from tests.harness.sharded import whole

# stage, dtype of the model, more of the configuration, and the class that DeepSpeed makes of it.
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 8}}
IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}
HALVES: list[tuple[int, torch.dtype, dict[str, Any], str]] = [
    (1, torch.bfloat16, BF16, "DeepSpeedZeroOptimizer"),
    (1, torch.bfloat16, BF16 | IN_FLOAT32, "BF16_Optimizer"),
    (2, torch.bfloat16, BF16 | IN_FLOAT32, "DeepSpeedZeroOptimizer"),
    (3, torch.bfloat16, BF16, "DeepSpeedZeroOptimizer_Stage3"),
    (3, torch.bfloat16, BF16 | IN_FLOAT32, "DeepSpeedZeroOptimizer_Stage3"),
    (1, torch.float16, FP16, "DeepSpeedZeroOptimizer"),
    (2, torch.float16, FP16, "DeepSpeedZeroOptimizer"),
    (3, torch.float16, FP16, "DeepSpeedZeroOptimizer_Stage3"),
]


def train_after_init(stage: int) -> list[Tensor]:
    return trained(stage, torch.float32, {}, init=True)[0]


def trained(stage: int, dtype: torch.dtype, more: dict[str, Any], init: bool = False) -> tuple[list[Tensor], str]:
    """What LAMB makes of the weights, as the optimizer steps them, and who holds them."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine, model, _ = start("lamb", stage, {}, more=more, init=init)
    for step in range(0, 3 * STEPS, 3):
        engine.backward(engine(batch(step).to(dtype).chunk(dist.get_world_size())[dist.get_rank()], step))
        engine.step()
        assert engine.was_step_applied()
    masters = [safe_get_full_fp32_param(p).detach().clone() for p in model.parameters() if p.requires_grad]
    wrapper = type(engine.optimizer).__name__
    engine.destroy()
    return masters, wrapper


@lru_cache
def reference_of_halves(dtype: torch.dtype) -> list[Tensor]:
    """The unsharded run with float32 masters, and the gradients of two ranks' copies in `dtype`, added as such."""
    row = named("lamb")
    model = whole("replicated", torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    optimizer = row.make(row.groups([*model.parameters()]))
    for step in range(0, 3 * STEPS, 3):
        optimizer.zero_grad()
        copies = [copy.deepcopy(model).to(dtype) for _ in range(2)]
        for part, computing in zip(batch(step).to(dtype).chunk(2), copies):
            computing(part, step).backward()
        for p, *mine in zip(model.parameters(), *(computing.parameters() for computing in copies)):
            if p.requires_grad:
                p.grad = sum(q.grad / 2 for q in mine).float()
        distopt.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("stage", "dtype", "more", "wrapper"), some([HALVES[i] for i in (1, 3, 6, 7)], HALVES), ids=str
)
def test_models_of_16_bits_are_stepped_by_float32_masters(
    stage: int, dtype: torch.dtype, more: dict[str, Any], wrapper: str
) -> None:
    """DeepSpeed sends gradients in the model's dtype, also where it accumulates them in float32."""
    for masters, holder in run(2, trained, stage, dtype, more):
        assert holder == wrapper
        assert distance(masters, reference_of_halves(dtype)) < TOLERANCE


@pytest.mark.parametrize("more", [BF16, FP16], ids=str)
def test_stage_0_of_16_bits_is_refused(more: dict[str, Any]) -> None:
    """DeepSpeed 0.19.8 steps once by itself there, with gradients of zeros: the state would be a step ahead."""
    with pytest.raises(RankError, match="DeepSpeed at stage 0 in 16 bits") as error:
        run(2, trained, 0, torch.bfloat16 if more == BF16 else torch.float16, more)
    assert error.value.kind == "ValueError"


def test_a_model_that_zero_init_has_sharded() -> None:
    for params in run(2, train_after_init, 3):
        assert distance(params, reference("lamb")) < TOLERANCE
