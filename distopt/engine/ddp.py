"""DDP: every rank holds the whole model, gradients are averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.engine.base import Engine, check_switch
from distopt.plan.footprint import Collective, Footprint, Units, every_layer, numel


class DDP(Engine):
    """Data parallelism with replicated parameters, gradients and optimizer state (`torch` DistributedDataParallel).

    bf16 is autocast.

    Args: precision and activation_checkpointing as `Engine`, and
        find_unused_parameters: needed where a step leaves parameters out; it costs a walk through every graph.
    """

    def __init__(
        self, precision: str = "auto", activation_checkpointing: bool = False, find_unused_parameters: bool = False
    ) -> None:
        super().__init__(precision, activation_checkpointing)
        check_switch("find_unused_parameters", find_unused_parameters)
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
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,  # the only buffers of a language model are constants
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
        )

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        assert isinstance(model, DistributedDataParallel)
        return contextlib.nullcontext() if last else model.no_sync()

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def unwrap(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, DistributedDataParallel)
        return model.module

    def footprint(self, units: Units, world: int) -> Footprint:
        layers = every_layer(units)
        state = sum(4 * layer.slots * layer.numel for layer in layers)
        fresh = 4 * max((layer.numel for layer in layers if layer.trained), default=0)  # not yet in its bucket
        gradients = 4 * numel(layers, trained=True)  # in DDP's buckets, which those of earlier micro-batches are not in
        return Footprint(4 * numel(layers), gradients, state, fresh, accumulated=gradients)

    def wire(self, units: Units, world: int, passes: int) -> list[Collective]:
        return [Collective("all_reduce", 4 * numel(every_layer(units), trained=True), world, 1, "backward")]
