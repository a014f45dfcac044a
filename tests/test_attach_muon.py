"""Muon and AdamW as one optimizer in Accelerate scripts: one clip, one schedule, one state, the unsharded run."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.accelerated import (
    ACCUMULATION,
    MAX_NORM,
    STEPS,
    TOLERANCE_DEEPSPEED,
    batch,
    start,
    start_deepspeed,
    start_fsdp,
    train,
)
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import full as full_of
from tests.harness.optimizers import distance

HALF = STEPS // 2
# Prepared, zero_stage, and the dtype. float64: sums in another order, 1e-16 of a gradient, which Newton-Schulz's small
# singular values stretch by up to 3.4 in each of five iterations and in each of the steps.
SETUPS: dict[str, tuple[str, int, torch.dtype]] = {
    "ddp": ("ddp", 0, torch.float64),
    "zero1": ("ddp", 1, torch.float64),
    "zero2": ("fsdp", 2, torch.float64),
    "fsdp2": ("fsdp", 3, torch.float64),
    **{f"deepspeed{stage}": ("deepspeed", stage, torch.float32) for stage in (1, 2, 3)},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: TOLERANCE_DEEPSPEED}


class Net(nn.Module):
    """A stack of matrices, a matrix of fewer rows than there are ranks, an output layer and vectors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 6)
        self.experts = nn.Parameter(torch.randn(3, 2, 6))
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 2)
        self.head = nn.Linear(2, 5)
        self.to(dtype)

    def forward(self, samples: Tensor, step: int) -> Tensor:
        samples = samples.to(self.up.weight.dtype)
        x = self.norm(self.up(torch.sin(torch.outer(samples, torch.arange(1, 5).to(samples)) + step)).tanh())
        x = self.mix(x) + torch.einsum("bi,eoi->bo", x, self.experts)
        return (self.head(x) - step).square().mean()


def muon(model: nn.Module) -> distopt.Muon:
    """The output layer has a rate of its own."""
    groups = distopt.param_groups(model, 0.1, {"head": {"lr": 0.01}}, matrices="muon")
    hidden = {name for group in groups if group["rule"] == "muon" for name in group["param_names"]}
    assert hidden == {"up.weight", "experts", "mix.weight"}
    return distopt.Muon(groups, lr=0.05, ns_dtype="float32")


@lru_cache
def reference(dtype: torch.dtype) -> list[Tensor]:
    model = Net(dtype)
    optimizer = muon(model)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(3 * step).to(dtype), 3 * step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return [p.detach() for p in model.parameters()]


def script(setup: str) -> tuple[Any, nn.Module, Any, Any]:
    """The accelerator, the model, the optimizer and the schedule, attached."""
    kind, stage, dtype = SETUPS[setup]
    accelerator = {
        "ddp": start,
        "fsdp": lambda: start_fsdp(reshard=stage == 3),
        "deepspeed": lambda: start_deepspeed(stage),
    }[kind]()
    model: nn.Module = Net(dtype)
    inner = muon(model)
    schedule = distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    model, optimizer = accelerator.prepare(model, inner)
    accelerator.register_for_checkpointing(schedule)
    distopt.attach(accelerator, model, optimizer, zero_stage=stage)
    return accelerator, model, optimizer, schedule


def steps(accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any, numbers: range) -> list[Tensor]:
    if getattr(accelerator, "deepspeed_engine_wrapped", None) is None:
        train(accelerator, model, optimizer, schedule, numbers)
        return [*full_of(model).values()]
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in numbers:  # DeepSpeed clips and steps inside of backward
        for part in batch(3 * step).float().chunk(ACCUMULATION):
            with accelerator.accumulate(model):
                accelerator.backward(model(part.chunk(world)[rank], 3 * step))
        schedule.step()
    return [*full_of(model).values()]


def first_half(setup: str, folder: Path) -> list[Tensor]:
    """The full parameters of a run that saves after half of its steps."""
    parts = accelerator, model, optimizer, schedule = script(setup)
    steps(*parts, range(HALF))
    if setup.startswith("deepspeed"):  # whose save_state loads at the same number of processes alone
        distopt.save_checkpoint(folder, model, optimizer, schedule)
    else:
        accelerator.save_state(str(folder))
    return steps(*parts, range(HALF, STEPS))


def second_half(setup: str, folder: Path) -> list[Tensor]:
    parts = accelerator, model, optimizer, schedule = script(setup)
    if setup.startswith("deepspeed"):
        distopt.load_checkpoint(folder, model, optimizer, schedule)
    else:
        accelerator.load_state(str(folder))
    return steps(*parts, range(HALF, STEPS))


@pytest.mark.parametrize(
    ("setup", "other"),
    some([("ddp", 4), ("fsdp2", 1), ("deepspeed2", 4)], itertools.product(SETUPS, (1, 4))),
)
def test_it_is_the_unsharded_run_and_resumes_at_another_number_of_processes(
    setup: str, other: int, tmp_path: Path
) -> None:
    dtype = SETUPS[setup][2]
    for world, half in ((2, first_half), (other, second_half)):
        for params in run(world, half, setup, tmp_path / "state"):
            assert distance(params, reference(dtype)) < TOLERANCE[dtype]
