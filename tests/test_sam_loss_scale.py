"""SAM under a loss scale."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import SAM
from distopt.layout.fsdp2 import reshard
from tests.harness.distributed import run
from tests.harness.optimizers import distance
from tests.harness.sam_steps import criterion, equal, leaves, outputs, samples_of, state_of, values
from tests.harness.sams import RHO
from tests.harness.sharded import Fleet, bind, shard, whole


def scaled(kind: str, poisoned: int) -> tuple[list[bool], list[float]]:
    """Three steps of float32 SAM under a loss scale; in the second, one rank's gradient of one pass is inf.

    Returns whether weights and state moved in each step, and the scales after them.
    """
    models: nn.Module = Fleet({"one": whole(kind, torch.float32)})
    if kind == "fsdp2":
        forward: nn.Module = shard(kind, models)
        scaler: Any = ShardedGradScaler("cpu", init_scale=1024.0)
    else:
        forward = DistributedDataParallel(models, find_unused_parameters=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    params = [p for p in models.parameters() if p.requires_grad]
    if kind == "zero1":
        optimizer: torch.optim.Optimizer = distopt.AdamW(params, lr=0.01)
        bind(kind, optimizer, models)
    else:  # a fused one takes scale and inf itself, but not through SAM: its steps were 1024 times too long
        optimizer = torch.optim.AdamW(params, lr=0.01, fused=kind != "fsdp2")
    sam = SAM(optimizer, RHO, scope="local" if kind == "local" else "global")
    moved, scales, bad = [], [], dist.get_rank() == 1

    def run_pass(step: int, which: int) -> None:
        sam.zero_grad()
        reshard(models)
        with forward.no_sync() if kind == "local" and which == 1 else contextlib.nullcontext():
            loss = forward(samples_of(kind, step).float(), step)
            scaler.scale(loss * (math.inf if bad and step == 1 and which == poisoned else 1.0)).backward()

    for step in range(3):
        before, state = values(models.parameters()), state_of(sam)
        run_pass(step, 1)
        sam.perturb()
        run_pass(step, 2)
        sam.restore()
        assert equal(values(models.parameters()), before)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")  # torch 2.13 of its own DTensor
            scaler.step(sam)
        scaler.update()
        after = state_of(sam)
        moved.append(not equal(values(models.parameters()), before))
        assert equal(after, state) != moved[-1]
        scales.append(scaler.get_scale())
    assert max(float((a - b).abs().max()) for a, b in zip(values(models.parameters()), before) if a.numel()) < 0.05
    return moved, scales


@pytest.mark.parametrize("kind", ["ddp", "local", "zero1", "fsdp2"])
@pytest.mark.parametrize("poisoned", [1, 2])
def test_under_a_loss_scale_an_overflow_in_either_pass_leaves_the_step_out(kind: str, poisoned: int) -> None:
    """On one rank only. With scope=local that rank alone knows of the first pass, until the second."""
    assert run(2, scaled, kind, poisoned) == [([True, False, True], [1024.0, 512.0, 512.0])] * 2


def test_a_loss_scale_does_not_show() -> None:
    """Also with a fused optimizer of torch's."""
    ends = []
    for scale in (None, 2.0**10):
        params = leaves()
        sam = SAM(torch.optim.AdamW(params, lr=0.05, fused=True), RHO)
        scaler = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
        for step in range(4):
            for which in (1, 2):
                sam.zero_grad()
                scaler.scale(criterion(outputs(params, step), step)).backward()
                sam.perturb() if which == 1 else sam.restore()
            scaler.step(sam)
            scaler.update()
        ends.append(values(params))
    assert distance(*ends) < 1e-12
