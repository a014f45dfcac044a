"""ZeRO-1: DDP with the optimizer's state sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.bounds import REDUCE_DTYPE, switch
from distopt.engine.ddp import DDP
from distopt.layout import ShardLayout, zero1_layout

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class _Zero1Model(DistributedDataParallel):
    """A DDP model with what its ZeRO-1 run has to remember, so that one engine may run several models.

    Attributes:
        units: The modules that wait for their updated rows one at a time; empty without overlap_gather.
        layout: The layout that `Zero1.attach` gave to the model's optimizer.
    """

    units: tuple[nn.Module, ...] = ()
    layout: ShardLayout | None = None


class Zero1(DDP):
    """Data parallelism with sharded optimizer state: each rank updates its own rows and sends them to the others.

    Communicates as many bytes as plain DDP. With N ranks and parameters of psi bytes each rank sends (N-1)/N psi of
    gradients, to the ranks that own their rows and overlapped with the backward pass, and (N-1)/N psi of updated rows.
    After a step a rank's gradients are right in its own rows and nan in the other rows.

    Args:
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        find_unused_parameters: As in `DDP`.
        reduce_dtype: The dtype in which gradients are sent: `fp32`, `bf16` (half the bytes), or None for their own.
        overlap_gather: Gather updated rows during the next forward pass, which waits for them block by block. Until
            then the rows of other ranks are nan: weights are read through `unwrap`, a state dict or the model's forward
            pass. Needs scratch memory of the model's size.

    Raises:
        ValueError: Any other reduce_dtype, an overlap_gather that is not a boolean, or as `DDP`.
    """

    _wrapper = _Zero1Model

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        find_unused_parameters: bool = False,
        reduce_dtype: str | None = None,
        overlap_gather: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing, find_unused_parameters)
        REDUCE_DTYPE.check("engine.reduce_dtype", reduce_dtype)
        switch().check("engine.overlap_gather", overlap_gather)
        self.reduce_dtype = reduce_dtype
        self.overlap_gather = overlap_gather

    def check_forward_only(self) -> None:
        raise ValueError("engine=zero1 shards the optimizer's state, and MeZO has none: use engine=ddp or fsdp2")

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        wrapped = super().build(model, blocks, fill, device)
        assert isinstance(wrapped, _Zero1Model)
        wrapped.units = tuple(blocks) if self.overlap_gather else ()
        return wrapped

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        assert isinstance(model, _Zero1Model)
        model.layout = zero1_layout(
            model, reduce_dtype=_DTYPES[self.reduce_dtype], units=model.units, gradients="reduce_scatter"
        )
        optimizer.bind(model.layout)
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, _Zero1Model)
        if model.layout is not None:
            model.layout.sync.wait()
        return super().unwrap(model)
