"""A step of some shards, as their rule says it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distopt.kernels.norms import squared_norms
from distopt.kernels.shards import Shards


class ForeachUpdate:
    """The directions of a rule, and what they do to the weights; a kernel does the same (`distopt.kernels.dispatch`).

        step:     p <- p - lr * direction
        squares:  moves the state; |p|^2 and |direction|^2 of each shard, for trust ratios, in digits
        (`distopt.kernels.exact`)
        apply:    p <- p - lr * ratio * direction, afterwards

    layers: the layer of each square.
    """

    def __init__(self, optimizer: Any, shards: Shards) -> None:
        self.group = shards.group
        self._optimizer, self._shards = optimizer, shards
        self._directed: list[tuple[Shards, list[Tensor]]] = []

    @property
    def layers(self) -> list[int]:
        return [layer for part, _ in self._directed for layer in part.layers]

    def step(self) -> None:
        for part in self._shards.slices():
            directions = self._optimizer.directions(part)
            torch._foreach_add_(part.params, directions, alpha=-self.group["lr"])

    def squares(self) -> tuple[Tensor, Tensor]:
        self._directed = [(part, self._optimizer.directions(part)) for part in self._shards.slices()]
        params = [p for part, _ in self._directed for p in part.params]
        directions = [d for _, directed in self._directed for d in directed]
        rows = [row for part, _ in self._directed for row in part.rows]
        return squared_norms(params, rows), squared_norms(directions, rows)

    def apply(self, factors: Tensor) -> None:
        """factors: by layer."""
        each = {dtype: factors.to(dtype).unbind() for dtype in {p.dtype for p in self._shards.params}}
        for part, directions in self._directed:
            factor = [each[p.dtype][layer] for layer, p in zip(part.layers, part.params)]
            torch._foreach_addcmul_(part.params, directions, factor, value=-self.group["lr"])
