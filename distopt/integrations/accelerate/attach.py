"""`attach`: the layout of a model that Accelerate prepared, and checkpoints that load at other numbers of processes."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distopt import layout
from distopt.integrations.accelerate.private import prepared_models, prepared_optimizers, prepared_schedulers
from distopt.integrations.accelerate.sam import attach_sam
from distopt.integrations.accelerate.save_state import check_single, keep_in_folder, refuse_files
from distopt.integrations.accelerate.zero1 import forget, zero1_layout
from distopt.layout.fsdp2 import reshard
from distopt.optim.averaging import ScheduleFree
from distopt.optim.base import ShardedOptimizer
from distopt.optim.mixed import MixedOptimizer
from distopt.sam import SAM

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, zero_stage: int | None = None) -> None:
    """Binds an optimizer to the layout that `accelerator.prepare` made, and makes save_state and load_state right.

    Every process must call it once, after `prepare`. State of earlier steps is sharded as the model's layout says.

    One process, DDP: `zero_stage` 0 or None keeps full state on every process. 1 shards it (ZeRO-1) at no additional
        communication: each process gets the gradients of the rows that it updates, and nan in all others;
        `accelerator.clip_grad_norm_` takes that into account. Where gradients cannot be reduce-scattered (fp16's loss
        scaler, a communication hook of DDP) they are full, and half as many bytes more are sent. `save_state` writes
        model and optimizer as a distopt checkpoint that `load_state` reads at any number of processes, with
        `zero_stage` 0 or 1. Every process must call them, on a file system that all of them share. Schedules, random
        numbers and positions in the data stay Accelerate's.
    Tensor parallelism without FSDP2: the layout is inferred from the parameters. `zero_stage` None or 0. `save_state`
        as under DDP.
    FSDP2: the layout is inferred from the parameters. `zero_stage` None, 3, or 2 (reshard_after_forward false).
        `save_state` is Accelerate's.
    DeepSpeed: binds the layout of its partitions. `zero_stage` None or its stage. `save_state` is DeepSpeed's, for the
        same number of processes. `distopt.save_checkpoint` moves from any of these to any other.

    Warns if a scheduler was prepared so that Accelerate steps it once per process, and if DeepSpeed clips gradients
    although the script does not ask for it.

    Args:
        accelerator: The accelerator that prepared both.
        model: The model that `prepare` returned.
        optimizer: The optimizer that `prepare` returned. It may be a `SAM`, which then leaves the model's statistics of
            batch norm alone in its second pass, and takes mixed precision into account.
        zero_stage: The ZeRO stage that the script expects, to be checked; None accepts any.

    Raises:
        ValueError: If `zero_stage` is not what Accelerate prepared, for engines and optimizers whose update is not
            known to be the unsharded one, for more than one model, for state of parameters that `prepare` has replaced,
            and for FriendlySAM under fp16's loss scale.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if zero_stage not in (None, 0, 1, 2, 3) or isinstance(zero_stage, bool):
        raise ValueError(f"zero_stage must be None, 0, 1, 2 or 3, got {zero_stage!r}")
    check_processes(accelerator)
    _check_prepared(accelerator, model, optimizer)
    kinds = [type(module) for module in model.modules()]
    if any(issubclass(kind, FullyShardedDataParallel) for kind in kinds):
        raise ValueError("Accelerate prepared FSDP1, which hides the layers in flat parameters: set fsdp_version=2")
    if hasattr(model, "zero_optimization_stage"):
        attach_deepspeed(model, zero_stage)
        _warn_of_clipping(accelerator, model)
    elif any(issubclass(kind, FSDPModule) for kind in kinds):
        _attach_fsdp2(accelerator, model, optimizer, zero_stage)
    else:
        _attach_whole(accelerator, model, optimizer, zero_stage)
    attach_sam(accelerator, model, optimizer)
    _warn_of_schedulers(accelerator)


def _attach_whole(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, zero_stage: int | None) -> None:
    """Full parameters on every process (DDP, or one process), or tensor parallelism over all processes."""
    ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    tensor_parallel = bool(meshes) and all(mesh.size() == accelerator.num_processes for mesh in meshes)
    if not tensor_parallel and (meshes or (accelerator.num_processes > 1 and not ddp)):
        raise ValueError(
            f"{type(model).__name__} on {accelerator.num_processes} processes ({accelerator.distributed_type}) is "
            "neither DDP, FSDP2, DeepSpeed nor tensor parallelism over all processes: give attach what prepare "
            "returned, or choose one of these"
        )
    if zero_stage not in (None, 0, 1):
        raise ValueError(
            f"zero_stage={zero_stage} was asked, Accelerate prepared {'DDP' if ddp else 'a single process'}: ask for "
            "zero_stage=0 or 1, or launch FSDP2 or DeepSpeed on GPUs, since on the CPU Accelerate silently drops them"
        )
    if zero_stage and tensor_parallel:
        raise ValueError(
            f"zero_stage={zero_stage} was asked, and tensor parallelism shards state as it does weights: ask for "
            "zero_stage=0"
        )
    _check_parameters(model, optimizer)
    forget(accelerator)
    if zero_stage == 1:
        inner = _distopt(optimizer)
        if not dist.is_initialized():  # one process without a launcher: a group of one, so that all code is the same
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        inner.bind(zero1_layout(accelerator, model, inner))
        refuse_files(inner)
    else:
        attach_ddp(model, optimizer)
    keep_in_folder(accelerator)


def attach_ddp(model: nn.Module, optimizer: Optimizer) -> None:
    """Binds an optimizer of full matrices (Muon) to the layout of DDP, whose ranks then share the matrices.

    Args:
        model: Does nothing unless it is or contains DDP.
        optimizer: Others, and those that share no work, need no layout under DDP.
    """
    ddp = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    inner = layout.unwrap_optimizer(optimizer)
    if ddp is not None and isinstance(inner, MixedOptimizer):
        inner.bind(layout.ddp_layout(ddp))


def _attach_fsdp2(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, zero_stage: int | None) -> None:
    if not accelerator.is_fsdp2:
        raise ValueError("the model was sharded by hand, so save_state would lose shards: let prepare shard it (FSDP2)")
    stage = 3 if accelerator.state.fsdp_plugin.reshard_after_forward else 2
    if zero_stage not in (None, stage):
        raise ValueError(
            f"zero_stage={zero_stage} was asked, Accelerate prepared FSDP2 with reshard_after_forward={stage == 3}, "
            f"which is zero_stage={stage}: ask for that, or change reshard_after_forward (true is zero_stage=3, false "
            "zero_stage=2)"
        )
    _check_parameters(model, optimizer)
    if isinstance(layout.unwrap_optimizer(optimizer), ScheduleFree):
        # Where FSDP2 keeps full weights after a forward pass without a backward pass, the next would use stale ones.
        model.register_forward_hook(lambda module, *_: None if torch.is_grad_enabled() else reshard(module))


def attach_deepspeed(engine: Any, zero_stage: int | None) -> None:
    """Binds DeepSpeed's client optimizer to the layout of its partitions.

    Args:
        engine: DeepSpeed's engine.
        zero_stage: As in `attach`.

    Raises:
        ValueError: The stage is another, or DeepSpeed's optimizer is SAM or not distopt's.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.basic_optimizer
    if zero_stage not in (None, stage):
        raise ValueError(
            f"zero_stage={zero_stage} was asked, Accelerate prepared DeepSpeed at stage {stage}: ask for that, or "
            "change zero_optimization.stage in DeepSpeed's configuration"
        )
    if isinstance(optimizer, SAM):
        raise ValueError("SAM cannot see the gradients that DeepSpeed keeps to itself: use DDP or FSDP2 with SAM")
    if not isinstance(optimizer, ShardedOptimizer):
        raise ValueError(
            f"DeepSpeed steps {type(optimizer).__name__}, not an optimizer of distopt: make one, and with "
            "offload_optimizer set zero_force_ds_cpu_optimizer=false, or Accelerate replaces it by DeepSpeedCPUAdam"
        )
    optimizer.bind(layout.deepspeed_layout(engine))


def check_processes(accelerator: Accelerator) -> None:
    """Raises ValueError if each process runs on its own.

    Accelerate 1.15 silently does that for some combinations of launcher and device.
    """
    launched = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, Accelerate runs {accelerator.num_processes}, each for itself: on the "
            "CPU make Accelerator(cpu=True) and launch with torchrun"
        )


def _check_prepared(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    models = any(module in prepared_models(accelerator) for module in model.modules())
    if not models or optimizer not in prepared_optimizers(accelerator):
        raise ValueError("call attach once, after accelerator.prepare, with the model and the optimizer it returned")
    check_single(accelerator)


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    held, own = {p for group in optimizer.param_groups for p in group["params"]}, set(model.parameters())
    if unknown := held - own:
        raise ValueError(
            f"{len(unknown)} of the {len(held)} parameters of the optimizer are not the model's: make the optimizer "
            "from model.parameters(), and give both to one accelerator.prepare"
        )
    if any(state for p, state in optimizer.state.items() if p not in held):
        raise ValueError(
            "the optimizer has stepped before accelerator.prepare, with state of parameters that were replaced: "
            "prepare before the first step"
        )


def _distopt(optimizer: Any) -> ShardedOptimizer:
    """Returns the optimizer inside Accelerate's wrapper and SAM."""
    optimizer = layout.unwrap_optimizer(optimizer)
    if not isinstance(optimizer, ShardedOptimizer):
        raise ValueError(
            f"zero_stage=1 needs an optimizer of distopt, got {type(optimizer).__name__}: use one, or zero_stage=0"
        )
    return optimizer


def _warn_of_clipping(accelerator: Accelerator, engine: Any) -> None:
    """Warns of clipping unasked: Accelerate 1.15 sets 1.0 where DeepSpeed's `gradient_clipping` is auto."""
    clipping = engine.gradient_clipping()
    if clipping and accelerator.state.deepspeed_plugin.gradient_clipping == "auto":
        warnings.warn(
            f"DeepSpeed clips gradients to a norm of {clipping}, which Accelerate chose and nobody asked for: give "
            "DeepSpeedPlugin(gradient_clipping=...), or gradient_clipping in DeepSpeed's configuration; 0.0 is none",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_schedulers(accelerator: Accelerator) -> None:
    from accelerate.scheduler import AcceleratedScheduler

    # Not DeepSpeed's, which is a subclass.
    own = [s for s in prepared_schedulers(accelerator) if type(s) is AcceleratedScheduler]
    if accelerator.num_processes > 1 and any(s.step_with_optimizer and not s.split_batches for s in own):
        warnings.warn(
            f"the scheduler was prepared, so Accelerate steps it {accelerator.num_processes} times per optimizer step: "
            "keep it out of prepare, step it where accelerator.sync_gradients, and register_for_checkpointing it",
            UserWarning,
            stacklevel=3,
        )
