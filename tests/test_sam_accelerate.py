"""SAM inside of Accelerate's `accumulate`."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distopt
from distopt import SAM
from tests.harness import oracles, oracles_sam
from tests.harness.distributed import run
from tests.harness.optimizers import distance, named
from tests.harness.sam_steps import Wrapped, leaves, own_loss, values
from tests.harness.sams import RHO


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
