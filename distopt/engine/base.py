"""What every engine does: starts the processes' group, checks what it got, builds the model, sums gradients."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.optim.clip import clip_, measure

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distopt.sam import SAM

_PRECISIONS = ("auto", "fp32", "bf16")


def check_switch(name: str, value: object) -> None:
    """Raises ValueError for a value that is not a boolean: any text would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"engine.{name} must be true or false, got {value!r}")


class Engine:
    """One way to run a model on several processes.

    Args:
        precision: `fp32`; `bf16` computes in bfloat16 and keeps parameters, gradients and state in float32; `auto` is
            bf16 on GPUs that have it, else fp32.
        activation_checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    """

    def __init__(self, precision: str = "auto", activation_checkpointing: bool = False) -> None:
        if precision not in _PRECISIONS:
            raise ValueError(f"engine.precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
        check_switch("activation_checkpointing", activation_checkpointing)
        gpu = torch.cuda.is_available()
        if precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"engine.precision=bf16: {torch.cuda.get_device_name()} has no bfloat16; use fp32")
        native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = precision == "bf16" or (precision == "auto" and native)
        self.activation_checkpointing = activation_checkpointing

    def start(self, timeout_minutes: float = 30.0) -> Accelerator:
        """Joins the processes that the launcher started; raises ValueError if they are not what was asked for."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count()
        if gpus and local > gpus:
            raise ValueError(f"{local} processes on a machine with {gpus} GPUs: launch with --num_processes {gpus}")
        self.check(world)
        # Imported here: Accelerate takes two seconds that refusing a configuration need not wait.
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.utils import ProjectConfiguration

        timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout_minutes))
        accelerator = Accelerator(
            cpu=not gpus,
            kwargs_handlers=[timeout],
            project_config=ProjectConfiguration(automatic_checkpoint_naming=False),
        )
        if not dist.is_initialized():  # one process without a launcher: a group of one, so that all code is the same
            backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Accelerate 1.15 silently runs single processes for some combinations of launcher and device.
        if accelerator.num_processes != world or dist.get_world_size() != world:
            raise ValueError(
                f"{world} processes were launched, Accelerate runs {accelerator.num_processes}: "
                f"use `accelerate launch --multi_gpu --num_processes {world}`, on CPUs too"
            )
        return accelerator

    def check(self, world: int) -> None:
        """Raises ValueError for what this engine cannot be on `world` processes."""

    def check_sam(self, sam: SAM) -> None:
        """Raises ValueError for a SAM that this engine cannot run."""

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        """Fills a meta model and wraps it for training.

        blocks: the units to fill, and to shard, one at a time; `fill(unit, device)` gives one its values.
        """
        raise NotImplementedError

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch: gradients are exchanged at the last of a step."""
        raise NotImplementedError

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        """Makes the optimizer the model's, and returns the model to train with.

        accumulation: micro-batches in a step. max_grad_norm: inf for no clipping.
        """
        return model

    def zero_grad(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Clears the gradients."""
        optimizer.zero_grad()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's share of the loss."""
        loss.backward()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> tuple[float, bool]:
        """Clips and steps; returns the global gradient norm before clipping, and whether weights moved.

        A norm that is inf or nan, which all ranks see alike, leaves weights and state as they are, and the gradients,
        which tell the layer.
        """
        grads, total = measure(optimizer)
        norm = float(total)
        applied = math.isfinite(norm)
        if applied:
            if norm > max_grad_norm:
                clip_(grads, total, max_grad_norm)
            optimizer.step()
        return norm, applied

    @contextlib.contextmanager
    def perturbed(self, model: nn.Module, sam: SAM) -> Iterator[None]:
        """Around the second pass of SAM; if that raises, the weights are as before."""
        try:
            with sam.perturbed():
                self.refresh(model)
                yield
        except BaseException:
            self.abort_pass(model)
            raise
        finally:
            self.refresh(model)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass."""
        return contextlib.nullcontext()

    def refresh(self, model: nn.Module) -> None:
        """After parameters changed, or ran without a backward pass: drops whole copies that would be stale."""

    def abort_pass(self, model: nn.Module) -> None:
        """After a pass that raised in its middle: the next one starts as if there had been none."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model as `transformers` made it."""
        return model

    def _checkpoint_activations(self, model: nn.Module) -> None:
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
