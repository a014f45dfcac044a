"""Loops as people write them, with a proof at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.harness.proof_setups import cut, grid, line


class Loop(NamedTuple):
    wrap: Callable[[nn.Module], Any]
    bind: Callable[[Any], Any] | None = None
    sam: Callable[[Any], Any] | None = None
    optimizer: Any = distopt.LAMB
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32


def classifier(dtype: torch.dtype) -> nn.Sequential:
    """With an embedding, statistics of each rank's own batches, and dropout that is not the same on two ranks."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(40) if dtype == torch.float32 else nn.Identity()
    layers = [nn.Embedding(50, 24), nn.Flatten(), nn.Linear(24 * 6, 40), norm, nn.Dropout(0.2), nn.GELU()]
    return nn.Sequential(*layers, nn.LayerNorm(40), nn.Linear(40, 7)).to(dtype)


def _units(model: Any) -> Any:
    units = [model.module[0], model.module[2], model.module[7]]
    return distopt.layout.zero1_layout(model, line(), units=units, gradients="reduce_scatter")


def _mixed(model: nn.Module) -> Any:
    model[3] = nn.Identity()  # torch's batch norm takes no bfloat16 with statistics in float32
    return cut(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def _zero1(model: Any) -> Any:
    return distopt.layout.zero1_layout(model.module, line())


LOOPS: dict[str, Loop] = {
    "ddp": Loop(DDP),
    "ddp, three micro-batches": Loop(DDP, micro_batches=3),
    "ddp, bfloat16 weights": Loop(DDP, optimizer=distopt.AdamW, dtype=torch.bfloat16),
    "ddp, SAM": Loop(DDP, sam=lambda o: distopt.SAM(o, rho=0.05)),
    "ddp, SAM by own gradients": Loop(DDP, sam=lambda o: distopt.SAM(o, rho=0.05, scope="local")),
    "ddp, LookSAM": Loop(DDP, sam=lambda o: distopt.LookSAM(o, rho=0.05)),
    "ddp, torch's AdamW": Loop(DDP, optimizer=torch.optim.AdamW),
    "zero1": Loop(DDP, _zero1),
    "zero1, masters": Loop(DDP, _zero1, dtype=torch.bfloat16),
    "zero1, scattered, overlapped": Loop(DDP, _units),
    "zero1, scattered, SAM": Loop(
        DDP,
        lambda m: distopt.layout.zero1_layout(m, line(), gradients="reduce_scatter"),
        lambda o: distopt.SAM(o, rho=0.05),
    ),
    "fsdp2": Loop(cut),
    "fsdp2, mixed precision": Loop(_mixed),
    "fsdp2, SAM": Loop(cut, sam=lambda o: distopt.SAM(o, rho=0.05)),
    "ddp, torch's Adafactor": Loop(DDP, optimizer=torch.optim.Adafactor),
    "hsdp": Loop(lambda m: cut(m, grid())),
    "hsdp, SAM": Loop(lambda m: cut(m, grid()), sam=lambda o: distopt.SAM(o, rho=0.05)),
}


def loop(name: str, steps: int) -> str:
    """The alarm, if there is one."""
    chosen = LOOPS[name]
    model = chosen.wrap(classifier(chosen.dtype))
    plain = getattr(model, "module", model)
    groups = list(plain.parameters()) if "torch" in name else distopt.param_groups(plain)
    optimizer = chosen.optimizer(groups, lr=1e-2)
    if chosen.bind:
        optimizer.bind(chosen.bind(model))
    distopt.prove_every(optimizer, plain, steps=1, state=True)
    stepper = chosen.sam(optimizer) if chosen.sam else optimizer
    if chosen.sam:
        stepper.model = plain
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=2 * steps)
    torch.manual_seed(100 + dist.get_rank())

    def loss() -> Tensor:
        x, y = torch.randint(0, 50, (8, 6)), torch.randint(0, 7, (8,))
        return nn.functional.cross_entropy(model(x).float(), y)

    def closure() -> Tensor:
        stepper.zero_grad()
        value = loss()
        value.backward()
        return value

    try:
        for _ in range(steps):
            if chosen.sam:
                stepper.step(closure)
            else:
                optimizer.zero_grad()
                for _ in range(chosen.micro_batches):
                    loss().backward()
                distopt.clip_grad_norm_(optimizer, 1.0)
                optimizer.step()
            schedule.step()
    except ValueError as error:
        return str(error)
    return ""


def loops(steps: int) -> dict[str, str]:
    """The alarms of all loops that this number of ranks can run."""
    names = [name for name in LOOPS if "hsdp" not in name or dist.get_world_size() == 4]
    return {name: said for name in names if (said := loop(name, steps))}
