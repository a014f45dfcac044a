"""Optimizers with state on every layout, and what tests of them compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt import layout
from distopt.layout.bucketed import bucket_layout
from tests.harness.sharded import mesh

SHAPES = [(5, 3), (1,), (6, 2)]  # on two ranks even rows, odd rows, and rows that one of them lacks


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList([torch.randn(shape, generator=numbers).to(dtype) for shape in shapes])

    def forward(self, step: int) -> Tensor:
        return sum((1 + i) * (p - 0.1 * step).square().sum() for i, p in enumerate(self.all))


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    cls: Callable[..., Any] = distopt.LAMB,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> tuple[nn.Module, Any]:
    """A model, the same on every rank and for each kind, and its optimizer."""
    model = Net(dtype, shapes)
    ranks = mesh((dist.get_world_size(),), ("shard",)) if dist.is_initialized() else None
    if kind == "fsdp2":
        fully_shard(model, mesh=ranks)
    if kind == "dtensor":  # without FSDP2's own hooks
        model.all = nn.ParameterList([distribute_tensor(p.detach(), ranks, [Shard(0)]) for p in model.all])
    opt = cls(model.parameters(), lr=0.01)
    if kind == "buckets":
        opt.bind(bucket_layout([*model.all], ranks))  # type: ignore[arg-type]
    if kind == "zero1":
        opt.bind(layout.zero1_layout(model, ranks))
    return model, opt


def train(model: nn.Module, opt: Any, steps: int = 3) -> None:
    for step in range(steps):
        opt.zero_grad()
        model(step).backward()
        distopt.clip_grad_norm_(opt, 5.0)
        opt.step()


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [full(p) for p in model.parameters()]


def contents(opt: Any) -> list[Any]:
    """All that a state dict holds, in full."""
    held = copy.deepcopy(opt.state_dict())
    state = [(k, name, full(v)) for k, values in held["state"].items() for name, v in values.items()]
    return [held["param_groups"], *state]
