"""Trainings by a Trainer with SAM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distopt
from tests.harness.engines import CONFIGS
from tests.harness.trainers import trainer, whole

STEPS = 3
# As in tests.test_engines: float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5
DROPOUT = CONFIGS["gpt2"] | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


def trained(
    folder: Path,
    config: dict[str, Any] | nn.Module,
    accumulation: int,
    fsdp2: bool = False,
    schedule: str = "linear",
    **options: Any,
) -> list[Tensor]:
    """The parameters after a Trainer has gone over the data once, in batches of `SEQUENCES` over all ranks."""
    made = trainer(
        folder,
        "fsdp2_full" if fsdp2 else "ddp",
        STEPS,
        options,
        config,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        lr_scheduler_type=schedule,
    )
    made.train()
    assert all(isinstance(p, DTensor) for p in made.model_wrapped.parameters()) == fsdp2
    return whole(made)


def on_ranks(
    folder: Path, config: dict[str, Any], accumulation: int, options: dict[str, Any], fsdp2: bool = False
) -> list[Tensor]:
    return trained(folder / str(dist.get_rank()), config, accumulation, fsdp2, **options)


SGD = {"optimizer_cls_and_kwargs": (distopt.SGD, {"lr": 0.3, "momentum": 0.9})}
SAM = {"sam": partial(distopt.SAM, rho=0.1)}


class Stop(Exception):
    pass
