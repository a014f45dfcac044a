"""ZeRO-1 in an Accelerate script, with as little communication as its settings allow."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt import layout
from distopt.kernels import exact
from distopt.layout import ShardLayout, layout_of
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


def zero1_layout(accelerator: Accelerator, model: nn.Module, optimizer: ShardedOptimizer) -> ShardLayout:
    """Makes ZeRO-1's layout, with reduce-scattered gradients (`distopt.layout.zero1_layout`) where that is possible.

    It is not possible where DDP has a communication hook of the script's, and where a loss scaler looks for inf in full
    gradients (fp16).
    """
    ddp = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    if ddp is None or ddp._comm_hooks or accelerator.scaler is not None:
        return layout.zero1_layout(model)
    _clip_rows(accelerator, optimizer)
    return layout.zero1_layout(ddp, gradients="reduce_scatter")


def forget(accelerator: Accelerator) -> None:
    """Restores the `clip_grad_norm_` of an accelerator that an earlier `attach` has replaced."""
    accelerator.__dict__.pop("clip_grad_norm_", None)


def _clip_rows(accelerator: Accelerator, optimizer: ShardedOptimizer) -> None:
    """Makes `accelerator.clip_grad_norm_` clip by the norm over all ranks, each with its own rows."""
    original, reference = accelerator.clip_grad_norm_, weakref.ref(optimizer)

    def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        bound = reference()
        if bound is None or not accelerator.sync_gradients:  # no step follows: gradients are not exchanged
            norm: Tensor = original(parameters, max_norm, norm_type)
            return norm
        if norm_type != 2:
            raise ValueError(f"norm_type={norm_type} under zero_stage=1, where norms over all ranks are 2-norms: use 2")
        params = [p for p in parameters if p.grad is not None]
        if not params:
            return torch.zeros((), dtype=torch.float32)
        shards = layout_of(bound)
        (norms,) = shards.norms(shards.layers(params), shards.grads(params))
        norm = exact.norm(norms).to(params[0].dtype)
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    accelerator.__dict__["clip_grad_norm_"] = clip_grad_norm_
