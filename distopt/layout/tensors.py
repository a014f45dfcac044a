"""Small questions about tensors that are plain or DTensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, and a plain tensor as it is."""
    # By attribute, since importing DTensor takes half a second that users of plain tensors need not wait.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a parameter's state and of its master: float32, or the parameter's own if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that an optimizer may update: they require a gradient, or have one from earlier."""
    return [p for p in params if p.requires_grad or p.grad is not None]


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that have a gradient."""
    return [p for p in params if p.grad is not None]
