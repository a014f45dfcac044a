"""A toy model under DeepSpeed with distopt's optimizers as its client optimizer."""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import distopt
from distopt import layout
from tests.harness.optimizers import ROWS
from tests.harness.sharded import whole

STEPS = 5
MAX_NORM = 1.0
# float32, as DeepSpeed keeps its partitions: rounding in every step, stretched where a second moment is small.
TOLERANCE = 1e-5


def batch(step: int) -> Tensor:
    return torch.rand(8, generator=torch.Generator().manual_seed(step))


@lru_cache
def reference(name: str) -> list[Tensor]:
    """The unsharded run. Steps are multiples of 3, at which every parameter is used: DeepSpeed gives others zeros."""
    row = next(row for row in ROWS if row.name == name)
    model = whole("replicated", torch.float32)
    optimizer = row.make(row.groups([*model.parameters()]))
    for step in range(0, 3 * STEPS, 3):
        optimizer.zero_grad()
        model(batch(step), step).backward()
        distopt.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def start(
    name: str,
    stage: int,
    zero: dict[str, Any],
    accumulation: int = 1,
    bind: bool = True,
    more: dict[str, Any] | None = None,
    init: bool = False,
    wrap: bool = False,
) -> tuple[Any, Any, Any]:
    """The engine, the model and the optimizer.

    init: cut the model up by zero.Init, before there is an optimizer. wrap: a part of it recomputes its activations.
    """
    warnings.simplefilter("ignore")  # DeepSpeed 0.19.8 uses deprecated names of torch
    logging.disable(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
    # DeepSpeed asks oneDNN, which has float16 on few CPUs; torch's own operations have it on all.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    row = next(row for row in ROWS if row.name == name)
    model = whole("replicated", torch.float32)
    if wrap:
        model.part = checkpoint_wrapper(model.part)  # type: ignore[assignment]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": 10**9,
        **(more or {}),
    }
    if init:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    optimizer = row.make(row.groups([*model.parameters()]))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if bind:
        optimizer.bind(layout.deepspeed_layout(engine))
    return engine, model, optimizer
