"""The protocol of an update, which applies a rule to some shards, and the update by foreach operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distopt.kernels.norms import squared_norms
from distopt.kernels.shards import Shards, computed

Directions = Callable[[Shards], list[Tensor]]
SquaredNorms = tuple[Tensor, ...]


class Update(Protocol):
    """The update of some shards: either `step`, or `squared_norms` and then `apply`.

    Attributes:
        group: The param group.
        layers: The index of the layer of each squared norm; valid after `squared_norms`.
    """

    group: dict[str, Any]

    @property
    def layers(self) -> list[int]: ...

    def step(self) -> None:
        """Updates the state, and p <- p - lr * direction."""

    def squared_norms(self) -> SquaredNorms:
        """Measures what a trust ratio needs: |p|^2, and |direction|^2 (which updates the state) or |gradient|^2.

        Returns:
            Two tensors (`CautiousUpdate`: up to six, of which it computes the norms) of shape [len(layers),
            exact.DIGITS], in the digits of `distopt.kernels.exact`.
        """

    def apply(self, ratios: Tensor | None) -> None:
        """Updates what is left: p <- p - lr * ratio * direction.

        Args:
            ratios: The trust ratios by layer, a float64 tensor of shape [layers of the model] on the device. None: all
                are 1, and the weights become bit for bit those of `step` on the CPU.
        """


class ForeachUpdate:
    """The update by the rule's own function, of torch's foreach operators; the kernels compute the same.

    Args:
        directions: The rule: `ShardedOptimizer.directions`.
        shards: Its inputs.
    """

    def __init__(self, directions: Directions, shards: Shards) -> None:
        self.group = shards.group
        self._directions, self._shards = directions, shards
        self._measured: list[tuple[Shards, list[Tensor]]] = []

    @property
    def layers(self) -> list[int]:
        return [layer for part, _ in self._measured for layer in part.layers]

    def step(self) -> None:
        for part in self._shards.slices():
            torch._foreach_add_(part.params, self._directions(part), alpha=-self.group["lr"])

    def squared_norms(self) -> SquaredNorms:
        # Without the gradients: where they were multiplied, the products are new tensors.
        self._measured = [(replace(part, grads=[]), self._directions(part)) for part in self._shards.slices()]
        params = [p for part, _ in self._measured for p in part.params]
        directions = [d for _, found in self._measured for d in found]
        rows = [row for part, _ in self._measured for row in part.rows]
        return squared_norms(params, rows), squared_norms(directions, rows)

    def apply(self, ratios: Tensor | None) -> None:
        for part, directions in self._measured:
            if ratios is None:
                torch._foreach_add_(part.params, directions, alpha=-self.group["lr"])
            else:
                factors = ratio_of_each(ratios, part)
                torch._foreach_addcmul_(part.params, directions, factors, value=-self.group["lr"])


class GradientRatioUpdate:
    """The update whose trust ratio is that of the gradient, which it multiplies before the state changes (LARS).

    Args:
        shards: The inputs of the rule.
        make: Gives the updates of shards, by kernels or by the rule's function.
        measure: Gives |p|^2 and |gradient|^2 of shards.
    """

    def __init__(
        self, shards: Shards, make: Callable[[Shards], Sequence[Update]], measure: Callable[[Shards], SquaredNorms]
    ) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._shards, self._make, self._measure = shards, make, measure

    def step(self) -> None:
        for update in self._make(self._shards):
            update.step()

    def squared_norms(self) -> SquaredNorms:
        return self._measure(self._shards)

    def apply(self, ratios: Tensor | None) -> None:
        for update in self.scaled(ratios):
            update.step()

    def scaled(self, ratios: Tensor | None) -> Sequence[Update]:
        """Returns the updates with the gradients that the ratios have multiplied, which can be measured in turn."""
        each = None if ratios is None else ratio_of_each(ratios, self._shards)
        return self._make(replace(self._shards, ratios=each))


def ratio_of_each(ratios: Tensor, shards: Shards) -> list[Tensor]:
    """Returns the ratio of each shard's layer as a 0-D tensor of the dtype in which its update is computed."""
    dtypes = list(map(computed, shards.params))
    by_dtype = {dtype: ratios.to(dtype).unbind() for dtype in set(dtypes)}
    return [by_dtype[dtype][layer] for layer, dtype in zip(shards.layers, dtypes)]
