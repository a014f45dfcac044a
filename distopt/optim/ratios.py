"""The trust ratios of the last step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from distopt.layout import ShardLayout


class Ratios:
    """The trust ratios of the last training step, which may have several calls of `step`: one for each partition."""

    def __init__(self) -> None:
        self._found: list[tuple[list[int], Tensor]] = []

    def add(self, layers: list[int], ratios: Tensor) -> None:
        """Adds the ratios of all layers, which are those of a param group for these layers."""
        self._found.append((layers, ratios))

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
