"""ZeRO-1: DDP whose optimizer state is cut up over the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from distopt import layout
from distopt.engine.ddp import DDP
from distopt.engine.footprint import Collective, Footprint, Units, every_layer, numel


class Zero1(DDP):
    """Data parallelism with the optimizer's state sharded: each rank steps its rows and sends them to the others.

    Args: as `DDP`.
    """

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        optimizer.bind(layout.zero1(self.unwrap(model)))
        return model

    def footprint(self, units: Units, world: int) -> Footprint:
        state = sum(4 * layer.slots * layer.rows(world) for layer in every_layer(units))
        return replace(super().footprint(units, world), state=state)

    def wire(self, units: Units, world: int, passes: int) -> list[Collective]:
        size = 4 * numel(every_layer(units), trained=True)
        return [
            Collective("reduce_scatter", size, world, 1, "backward"),
            Collective("all_gather", size, world, 1, "step"),
        ]
