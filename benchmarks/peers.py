"""Other packages for sharded training, set up according to their manuals, with clipping."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from benchmarks import gpt
from distopt.engine import DDP, FSDP2, DeepSpeed, Engine
from distopt.engine.train_step import next_token_loss

Step = Callable[[Tensor], Tensor]  # a training step on the local part of a batch; returns its loss
LR, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.1, 1.0


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return param groups in which matrices decay, without the options of distopt."""
    made = distopt.param_groups(model, WEIGHT_DECAY)
    return [{name: group[name] for name in ("params", "weight_decay")} for group in made]


def torch_loop(engine: Engine, model: nn.Module, optimizer: Any) -> Step:
    """Return the training step of torch's tutorials, for a model that torch has wrapped."""

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        with engine.autocast(batch.device):
            loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.detach()

    return step


class PlainFSDP2(FSDP2):
    """FSDP2 as torch's tutorial wraps a transformer: each block is a unit, and the rest of the model is another."""

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        for unit in (*blocks, model):
            fill(unit, device)
            reshard = self.reshard_after_forward and unit is not model
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        return model


def torch_adamw(engine: Engine, device: torch.device, options: argparse.Namespace) -> tuple[Step, Any]:
    """Return a step of `torch.optim.AdamW(fused=True)` on FSDP2, and the optimizer with the state."""
    model = gpt.build(engine, device, options)
    optimizer = torch.optim.AdamW(groups(model), lr=LR, fused=True)
    return torch_loop(engine, model, optimizer), optimizer


def zero_redundancy(device: torch.device, options: argparse.Namespace) -> tuple[Step, Any]:
    """Return a step of `ZeroRedundancyOptimizer` over fused AdamW on DDP, and the optimizer with the state.

    Parameters are views of buckets, which takes fewer broadcasts and is faster.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer

    engine = DDP(options.precision)
    model = gpt.build(engine, device, options)
    optimizer = ZeroRedundancyOptimizer(
        groups(model), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LR, fused=True
    )
    return torch_loop(engine, model, optimizer), optimizer.optim


def deepspeed_own(params: Iterable[Any]) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW: FusedAdam on a GPU, otherwise CPUAdam. Its op is built once, which takes a minute."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if torch.cuda.is_available():
        return FusedAdam(params, lr=LR, adam_w_mode=True)
    return DeepSpeedCPUAdam(params, lr=LR, adamw_mode=True)


def deepspeed_loop(
    stage: int,
    make: Callable[[Iterable[Any]], torch.optim.Optimizer],
    device: torch.device,
    options: argparse.Namespace,
) -> tuple[Step, Any]:
    """Return a step of DeepSpeed with another package's optimizer as its client optimizer, and that optimizer."""
    engine = DeepSpeed(stage, options.precision)
    plain = gpt.build(engine, device, options)
    import_deepspeed()
    import deepspeed

    optimizer = make(groups(plain))
    config = {
        "train_micro_batch_size_per_gpu": options.batch_size // options.processes,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": engine.bf16},
        "steps_per_print": 10**9,
    }
    model, *_ = deepspeed.initialize(model=plain, optimizer=optimizer, config=config)

    def step(batch: Tensor) -> Tensor:
        loss = next_token_loss(model, batch)
        model.backward(loss)
        model.step()
        return loss.detach()

    return step, optimizer


def import_deepspeed() -> None:
    """Import DeepSpeed as `distopt.engine.DeepSpeed` does: without building an op that training never uses."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
