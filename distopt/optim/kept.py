"""The local shards of a param group, kept from step to step: gradients alone are new in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from distopt.kernels.columns import PLAIN, Column
from distopt.kernels.narrow import WEIGHTS, Narrow
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout, local_parts
from distopt.layout.tensors import same


class KeptShards:
    """The shards of weights and state of a param group, as long as they are where they were.

    Args:
        layout: The layout of the parameters.
        params: The parameters, with or without a gradient.
        sources: The tensors of the parameters whose shards are kept, by name; None for a parameter without one.
        shards: The local shards of these tensors.
        narrow: What is known beside of these shards, if some are stored in fewer than 32 bits.

    Attributes:
        columns: The shards by name, without those that are empty.
        layers: The index of the layer of each shard.
        rows: The elements of a row of each.
        states: The state of each parameter, as the last step found it.
    """

    states: list[dict[str, Any]]

    def __init__(
        self,
        layout: ShardLayout,
        params: Sequence[Tensor],
        sources: Mapping[str, Sequence[Any]],
        shards: Mapping[str, Sequence[Any]],
        narrow: Narrow | None = None,
    ) -> None:
        self._layout, self._params = layout, list(params)
        self._sources = {name: list(tensors) for name, tensors in sources.items()}
        self._places = {name: _places(tensors) for name, tensors in sources.items()}
        layers = layout.layers(params)
        of = [i for i, p in enumerate(params) for _ in layout.segments[p]]
        first = shards[WEIGHTS]
        filled = [i for i, shard in enumerate(first) if shard.numel()]
        self._filled = None if len(filled) == len(first) else filled
        self._owners = [of[i] for i in filled]
        self.columns = {name: Column(parts[i] for i in filled) for name, parts in shards.items()}
        self.layers = [layers[i] for i in filled]
        self.rows = layout.rows(self.layers)
        self._narrow = None if narrow is None else narrow.part(filled)

    def hold(self, layout: ShardLayout, params: Sequence[Tensor], sources: Mapping[str, Sequence[Any]]) -> bool:
        """Whether these are the shards of the same objects in the same memory.

        A parameter may get other memory under the same object (`param.data = ...`, `module.to`, an FSDP2 module that
        loads by assignment).
        """
        return (
            layout is self._layout
            and same(params, self._params)
            and sources.keys() == self._sources.keys()
            and all(same(tensors, self._sources[name]) for name, tensors in sources.items())
            and all(_places(tensors) == self._places[name] is not None for name, tensors in sources.items())
        )

    def owners(self, params: Sequence[Tensor]) -> list[int]:
        """Returns the index of the parameter of each shard of some of the parameters, which are in the same order."""
        if len(params) == len(self._params):
            return self._owners
        index = {id(p): i for i, p in enumerate(params)}
        return [index[key] for key in (id(self._params[owner]) for owner in self._owners) if key in index]

    def shards(
        self, group: dict[str, Any], rule: Rule, params: Sequence[Tensor], grads: list[Tensor], factor: float | Tensor
    ) -> Shards:
        """Returns the inputs of a rule, but for the counts of steps.

        Args:
            group: The param group.
            rule: The specification, all of whose buffers are kept.
            params: The parameters that have a gradient.
            grads: Their local gradient shards, as `ShardLayout.grads` gives them.
            factor: What the gradients are to be multiplied by.
        """
        weights: list[Tensor] = self.columns[WEIGHTS]
        buffers: dict[str, list[Tensor]] = {name: self.columns[name] for name in rule.buffers}
        steps = [0.0] * len(weights)
        all_shards = Shards(
            *(group, rule, self.layers, weights, weights, buffers, steps, self.rows),
            grad_factor=factor,
            narrow=self._narrow,
        )
        if len(params) == len(self._params):
            grads = grads if self._filled is None else [grads[i] for i in self._filled]
            return replace(all_shards, grads=grads)
        having = {id(p) for p in params}
        indices = [i for i, owner in enumerate(self._owners) if id(self._params[owner]) in having]
        return replace(all_shards.part(indices), grads=[g for g in grads if g.numel()])


def _places(tensors: Sequence[Any]) -> tuple[list[int], list[int], list[bool]] | None:
    """Returns what tells whether the memory of each tensor is another one; None if a subclass has it elsewhere."""
    parts = Column(local_parts([tensor for tensor in tensors if tensor is not None]))
    if not set(map(type, parts)).issubset(PLAIN):
        return None
    return parts.addresses, parts.numels, list(map(Tensor.is_contiguous, parts))
