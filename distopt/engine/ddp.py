"""DDP: every rank has a full copy of the model, and gradients are averaged over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.bounds import switch
from distopt.engine.base import Engine
from distopt.layout import ddp_layout
from distopt.optim.mixed import MixedOptimizer


class DDP(Engine):
    """Data parallelism with replicated parameters, gradients and optimizer state (`torch` DistributedDataParallel).

    bf16 is autocast.

    Args:
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        find_unused_parameters: Needed where a step does not use some of the parameters; costs a traversal of every
            graph.
        compile: As in `Engine`.

    Raises:
        ValueError: A switch is not a boolean, or as `Engine`.
    """

    _wrapper: type[DistributedDataParallel] = DistributedDataParallel

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        find_unused_parameters: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing, compile)
        switch().check("engine.find_unused_parameters", find_unused_parameters)
        self.find_unused_parameters = find_unused_parameters

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        for unit in (*blocks, model):
            fill(unit, device)
        self._checkpoint_activations(model)
        self._compile(blocks)
        return self._wrapper(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,  # the only buffers of a language model are constants
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
        )

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        assert isinstance(model, DistributedDataParallel)
        if isinstance(optimizer, MixedOptimizer):
            optimizer.bind(ddp_layout(model))
        return model

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        assert isinstance(model, DistributedDataParallel)
        return contextlib.nullcontext() if last else model.no_sync()

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def unwrap(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, DistributedDataParallel)
        return model.module
