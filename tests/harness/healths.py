"""A watched optimizer on every layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.harness.optimizers import ROWS, Row
from tests.harness.sharded import backward, reduce_scattered, sharded, whole

UNWATCHED = ("cautious_adamw", "cautious_lamb", "sgd_schedule_free", "adamw_schedule_free")
BY_NAME = {row.name: row for row in ROWS if row.name not in UNWATCHED}


def setup(kind: str, row: Row, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Any]:
    """The model as it is called, the model inside, and a bound optimizer with two param groups."""
    inner = sharded(kind, dtype) if dist.is_initialized() else whole(kind, dtype)
    model: nn.Module = inner
    if kind == "zero1" and dist.is_initialized():
        model = DistributedDataParallel(inner, find_unused_parameters=True)
    opt = row.cls(row.groups([p for p in inner.parameters() if p.requires_grad]), **row.kwargs)
    if model is not inner:
        opt.bind(reduce_scattered(model))
    return model, inner, opt


def graded(model: nn.Module, inner: nn.Module, kind: str, step: int) -> None:
    inner.zero_grad()
    if model is inner:
        backward(model, kind, step)
        return
    samples = torch.rand(8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    samples = samples.to(next(inner.parameters()).dtype).chunk(dist.get_world_size())[dist.get_rank()]
    model(samples, step).backward()


class Line(nn.Module):
    """A few layers for spikes: the gradient of each is about the same in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())
