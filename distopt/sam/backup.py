"""Copies of the tensors that a perturbation moves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Backup:
    """Copies of tensors, from which `restore` brings their values back bit for bit.

    Subtracting the perturbation again would leave rounding errors. Each copy has the size of its tensor: of the local
    shard where parameters are sharded.

    Args:
        tensors: The tensors to copy.

    Attributes:
        tensors: The tensors, in the order in which they were added.
        copies: Their values when they were added.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Copies further tensors."""
        for tensor in tensors:
            self.tensors.append(tensor)
            self.copies.append(tensor.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copies back into their tensors."""
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
