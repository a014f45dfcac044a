"""The trust ratios of the last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distopt.kernels import dispatch
from distopt.kernels.update import Update
from distopt.layout import ShardLayout

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer
    from distopt.optim.clip import Clip


class Ratios:
    """The trust ratios of the last training step, which may have several calls of `step`: one for each partition.

    Attributes:
        norms: The norms of the last call: |p| and |direction|, or |gradient|, of every layer of the model.
    """

    norms: Tensor | None = None

    def __init__(self) -> None:
        self._found: list[tuple[list[int], Tensor]] = []

    def measure(
        self, optimizer: ShardedOptimizer, layout: ShardLayout, updates: list[Update], clip: Clip | None
    ) -> list[Tensor]:
        """Exchanges the sums of the layers of these updates, and returns the trust ratios for each, or 1."""
        if not updates:
            return []
        if clip is not None and clip.weight_norms is not None:  # both norms are known
            self.norms = torch.stack([clip.weight_norms, clip.norms * clip.factor])
            norms = [(self.norms[0], self.norms[1])] * len(updates)
        else:
            squares = dispatch.concatenated([update.squared_norms() for update in updates])
            sums = layout.total([layer for update in updates for layer in update.layers], *squares)
            self.norms, norms = sums[:2].sqrt(), dispatch.norms(updates, sums)
        found = []
        for update, (weight, other) in zip(updates, norms):
            ratios = torch.ones_like(weight)
            if update.group["trust_ratio"]:
                measured = optimizer.trust_ratio(update.group, weight, other)
                ratios = torch.where((weight > 0) & (other > 0), measured, ratios)
                ratios = ratios if (bounds := update.group["trust_clip"]) is None else ratios.clamp(*bounds)
                self._found.append((update.layers, ratios))
            found.append(ratios)
        return found

    def forget(self, layout: ShardLayout, params: Iterable[Tensor]) -> None:
        """Drops the ratios of the last step; where a step has several calls, those of the layers of this call."""
        if layout.gradients_visible:
            self._found = []
            return
        layers = set(layout.layers(params))
        self._found = [(of, ratios) for of, ratios in self._found if layers.isdisjoint(of)]

    def by_param(self, layout: ShardLayout) -> dict[Tensor, Tensor]:
        """Returns the ratio of each layer that this rank has a part of, by parameter of the model."""
        return {layout.params[layer]: ratios[layer] for layers, ratios in self._found for layer in layers}


def compares_gradients(optimizer: ShardedOptimizer) -> bool:
    """Whether trust ratios compare the norms of the gradients with those of the parameters (not of masters)."""
    groups = optimizer.param_groups
    if optimizer.ratio_of != "gradient" or any(group["cautious"] for group in groups):
        return False
    masters = any(p.dtype.itemsize < 4 for group in groups for p in group["params"])
    return any(group["trust_ratio"] for group in groups) and not masters
