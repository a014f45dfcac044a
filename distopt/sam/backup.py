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
        """Copies further tensors, plain ones."""
        added = list(tensors)
        self.tensors += added
        with torch.no_grad():
            self.copies += torch._foreach_clone(added) if added else []

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copies back into their tensors."""
        if self.tensors:
            torch._foreach_copy_(self.tensors, self.copies)
