"""A small model that torch's tests of its optimizers train."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

# The order of operations differs: 1e-16 and 6e-8 in each, stretched by Adam where a gradient is small.
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def layer(dtype: torch.dtype = torch.float64, contiguous: bool = True) -> list[Tensor]:
    """A matrix and a vector."""
    numbers = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=numbers, dtype=dtype) for shape in ((10, 5, 2), (10, 2))]
    return [nn.Parameter(p[..., 0].contiguous() if contiguous else p[..., 0]) for p in params]


def forward_backward(opt: torch.optim.Optimizer, params: list[Tensor]) -> Tensor:
    opt.zero_grad()
    weight, bias = params[:2]
    loss = (weight.mv(torch.linspace(-1.0, 1.0, weight.shape[1], dtype=weight.dtype)) + bias).pow(2).sum()
    loss.backward()
    return loss


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: int = 5) -> None:
    for _ in range(steps):
        forward_backward(opt, params)
        opt.step()


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **CLOSE[p.dtype])


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def first() -> Tensor:
    return nn.Parameter(torch.ones(1, 1))
