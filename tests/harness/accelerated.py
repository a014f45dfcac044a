"""Real Accelerate scripts on the ranks of the pool: what each of them starts with."""

from __future__ import annotations

import logging
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distopt
from tests.harness.optimizers import named
from tests.harness.sharded import full, whole

ACCUMULATION = 2
MAX_NORM = 1.0
STEPS = 6  # saved after the first half
# float64: ranks and micro-batches add the same numbers in another order, nothing else differs.
TOLERANCE = 1e-12
# float32, as DeepSpeed keeps its partitions; as in test_deepspeed.
TOLERANCE_DEEPSPEED = 1e-5


def start(**kwargs: Any) -> Any:
    """An Accelerator as in a script's first line; the processes of the pool have had others before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))  # as torchrun does
    return Accelerator(**{"cpu": True, "gradient_accumulation_steps": ACCUMULATION} | kwargs)


def start_fsdp(reshard: bool = True, version: int = 2, mixed_precision: str = "no") -> Any:
    """FSDP on the CPU. Accelerate 1.15 has it for accelerators only, and drops it silently; this is all that lacks."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator = start(mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, reshard_after_forward=reshard, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    for state in (accelerator.state.__dict__, PartialState._shared_state):
        state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def start_deepspeed(stage: int, clipping: float | str = MAX_NORM, **zero: Any) -> Any:
    warnings.simplefilter("ignore")  # DeepSpeed 0.19.8 uses deprecated names of torch
    logging.disable(logging.WARNING)
    import deepspeed.ops
    from accelerate import DeepSpeedPlugin, InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": 10**9,
    }
    os.environ.pop("ACCELERATE_USE_CPU", None)  # of a test of the Trainer in the same process
    before = dict(os.environ)
    try:
        gloo = InitProcessGroupKwargs(backend="gloo")  # without, Accelerate runs a single process on each rank
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        return start(cpu=False, kwargs_handlers=[gloo], deepspeed_plugin=plugin)
    finally:
        os.environ.clear()
        os.environ.update(before)


def lamb(model: nn.Module) -> distopt.ShardedOptimizer:
    row = named("lamb")
    return row.make(row.groups([*model.parameters()]))


def prepared(accelerator: Any, zero: int | None, sam: bool = False) -> tuple[nn.Module, Any, Any]:
    """The model, the optimizer and the schedule of a script, attached."""
    model = whole("replicated")
    inner = lamb(model)
    schedule = distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    model, optimizer = accelerator.prepare(model, distopt.SAM(inner) if sam else inner)
    accelerator.register_for_checkpointing(schedule)
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    return model, optimizer, schedule


def batch(step: int) -> Tensor:
    return torch.rand(8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    """The loop of any Accelerate script. At multiples of 3 every parameter is used, as DDP wants it."""
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in steps:
        for part in batch(3 * step).chunk(ACCUMULATION):
            with accelerator.accumulate(model):
                accelerator.backward(model(part.chunk(world)[rank], 3 * step))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()


@lru_cache
def reference() -> list[Tensor]:
    """The unbroken, unsharded run."""
    model = whole("replicated")
    optimizer = lamb(model)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(3 * step), 3 * step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return [p.detach() for p in model.parameters()]


def load(folder: Path, zero: int) -> tuple[list[Tensor], int]:
    accelerator = start()
    script = prepared(accelerator, zero)
    train(accelerator, *script, range(1))  # what was there before makes no difference
    accelerator.load_state(str(folder))
    step = accelerator.step
    train(accelerator, *script, range(STEPS // 2, STEPS))
    return full(script[0]), step
