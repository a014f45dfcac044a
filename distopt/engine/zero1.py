"""ZeRO-1: DDP whose optimizer state is cut up over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from distopt import layout
from distopt.engine.ddp import DDP

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class Zero1(DDP):
    """Data parallelism with the optimizer's state sharded: each rank steps its rows and sends them to the others.

    Moves what plain DDP moves. With N ranks and parameters of psi bytes each rank sends (N-1)/N psi of gradients, to
    the ranks that step them and beside the backward pass, and (N-1)/N psi of stepped rows. After a step a rank's
    gradients are right in its own rows and nan in others.

    Args: as `DDP`, and
        reduce_dtype: in which gradients are sent: `fp32`, `bf16` at half the bytes, None for their own.
        overlap_gather: stepped rows come beside the next forward pass, which waits for them block by block; until then
            others' rows are nan: weights are read by `unwrap`, a state dict or the model's forward pass. Needs scratch
            memory of the model's size.

    Raises ValueError for another reduce_dtype.
    """

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        find_unused_parameters: bool = False,
        reduce_dtype: str | None = None,
        overlap_gather: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing, find_unused_parameters)
        if reduce_dtype not in _DTYPES:
            raise ValueError(f"engine.reduce_dtype must be fp32, bf16 or null, got {reduce_dtype!r}")
        self.reduce_dtype = reduce_dtype
        self.overlap_gather = overlap_gather
        self._units: Sequence[nn.Module] = ()
        self._layout: layout.ShardLayout | None = None

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        self._units = blocks if self.overlap_gather else ()
        return super().build(model, blocks, fill, device)

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        self._layout = layout.zero1_layout(
            model, reduce_dtype=_DTYPES[self.reduce_dtype], units=self._units, gradients="reduce_scatter"
        )
        optimizer.bind(self._layout)
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        if self._layout is not None:
            self._layout.sync.wait()
        return super().unwrap(model)
