"""Proofs of each set-up, for `tests/test_proof.py`, and fingerprints of one model however it is sharded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.harness import proof_right, proof_wrong  # noqa: F401
from tests.harness.proof_setups import CASES, cut, grid, lamb, line, with_deepspeed


def prove_each(names: list[str]) -> dict[str, str]:
    """What a proof of each case says on this rank; an empty string if nothing is wrong."""
    said = {}
    for name in names:
        torch.manual_seed(0)
        optimizer, model = CASES[name].make()
        engine = model if hasattr(model, "zero_optimization_stage") else None
        try:
            distopt.prove(optimizer, None if engine is not None else model, state=True)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
        if engine is not None:
            engine.destroy()
    return said


def wide() -> nn.Sequential:
    """Rows that no number of ranks divides, three dimensions, and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 6), nn.Conv1d(3, 5, 3, bias=False), nn.Linear(3, 2))
    model[3].requires_grad_(False)
    return model


def fingerprints(dtype: str) -> dict[str, distopt.Fingerprint]:
    """Of the same model and state, however they are sharded."""
    world = dist.get_world_size()
    kinds = ["plain", "ddp", "zero1", "fsdp2", "tensor_parallel"] + ["hsdp"] * (world == 4)
    found = {}
    for kind in kinds:
        model: Any = wide().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        if kind in ("ddp", "zero1"):
            model = DDP(model)
        elif kind in ("fsdp2", "hsdp"):
            cut(model, grid() if kind == "hsdp" else None)
        elif kind == "tensor_parallel":
            parallelize_module(model, line(), {"0": ColwiseParallel(), "1": RowwiseParallel()})
        optimizer = lamb(model.parameters())
        if kind == "zero1":
            optimizer.bind(distopt.layout.zero1_layout(model.module, line()))
        found[kind] = _with_state(model, optimizer)
    for stage in (1, 2, 3) if world == 2 else ():
        model = wide()
        optimizer, engine = with_deepspeed(stage, model, dtype, [p for p in model.parameters() if p.requires_grad])
        found[f"deepspeed{stage}"] = _with_state(engine, optimizer)
        engine.destroy()
    return found


@torch.no_grad()
def _with_state(model: nn.Module, optimizer: distopt.LAMB) -> distopt.Fingerprint:
    """With a state that is not zero everywhere: the exp_avg of each weight is the weight."""
    optimizer.init_state()
    layout = optimizer.layout
    for owner in layout.segments:
        buffer = optimizer.state[owner]["exp_avg"]
        if owner.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters()):
            for to, weight in zip(layout.split(owner, buffer), layout.split(owner, owner.detach())):
                to.copy_(weight)
    return distopt.fingerprint(model, optimizer)
