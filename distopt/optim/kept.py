"""The local shards of a param group, kept from step to step: gradients alone are new in each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from distopt.kernels.columns import PLAIN, Column
from distopt.kernels.narrow import WEIGHTS, Narrow
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout, local_parts
from distopt.layout.tensors import same

Options = tuple[Any, ...]


class KeptShards:
    """The shards of weights and state of a param group, as long as they are where they were.

    Args:
        layout: The layout of the parameters.
        params: The parameters, with or without a gradient.
        states: The state of each.
        options: The names of the tensors in it, and the options of the group on which it depends what these are.
        beside: What the states of parameters of 16 bits have beside the buffers of the rule, of `masters.beside`.
        buffers: The local shards of the buffers, by name.
        narrow: What is known beside of the shards, if some are stored in fewer than 32 bits.

    Attributes:
        columns: The shards of weights and buffers by name, without those that are empty.
        has_masters: Whether some weights are masters.
        layers: The index of the layer of each shard.
        rows: The elements of a row of each.
        states: The state of each parameter, as the last step found it.
    """

    states: list[dict[str, Any]]

    def __init__(
        self,
        layout: ShardLayout,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        options: Options,
        beside: Collection[str],
        buffers: Mapping[str, Sequence[Any]],
        narrow: Narrow | None = None,
    ) -> None:
        self._layout, self._params, self._options, self._beside = layout, list(params), options, beside
        self.has_masters = "master" in beside
        self._sources = self._read(states)
        self._places = list(map(_places, self._sources.values()))
        self._dtypes = [p.dtype for p in params] if self.has_masters else []
        layers = layout.layers(params)
        of = [i for i, p in enumerate(params) for _ in layout.segments[p]]
        weights = layout.shards(params, self._sources[WEIGHTS])
        filled = [i for i, shard in enumerate(weights) if shard.numel()]
        self._filled = None if len(filled) == len(weights) else filled
        self._owners = [of[i] for i in filled]
        shards = {WEIGHTS: weights, **buffers}
        self.columns = {name: Column(parts[i] for i in filled) for name, parts in shards.items()}
        self.layers = [layers[i] for i in filled]
        self.rows = layout.rows(self.layers)
        self._narrow = None if narrow is None else narrow.part(filled)

    def hold(
        self, layout: ShardLayout, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]], options: Options
    ) -> bool:
        """Whether these are the shards of the same objects in the same memory.

        A parameter may get other memory under the same object (`param.data = ...`, `module.to`, an FSDP2 module that
        loads by assignment).
        """
        if layout is not self._layout or options != self._options or not same(params, self._params):
            return False
        if self.has_masters and [p.dtype for p in params] != self._dtypes:  # of which one may need a master no longer
            return False
        sources = self._read(states)
        return all(same(tensors, self._sources[name]) for name, tensors in sources.items()) and all(
            _places(tensors) == places is not None for tensors, places in zip(sources.values(), self._places)
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
        every = len(params) == len(self._params)
        if every and self._filled is not None:
            grads = [grads[i] for i in self._filled]
        all_shards = Shards(
            *(group, rule, self.layers, weights, grads if every else weights, buffers, steps, self.rows),
            grad_factor=factor,
            narrow=self._narrow,
        )
        if every:
            return all_shards
        having = {id(p) for p in params}
        indices = [i for i, owner in enumerate(self._owners) if id(self._params[owner]) in having]
        return replace(all_shards.part(indices), grads=[g for g in grads if g.numel()])

    def _read(self, states: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Returns the tensors whose shards are kept, by name: None for a parameter without one."""
        names, *_ = self._options
        found = {name: [state.get(name) for state in states] for name in names}
        if "remainder" in self._beside:
            found["remainder"] = [state.get("remainder") for state in states]
        if not self.has_masters:
            return found | {WEIGHTS: self._params}
        pairs = zip(self._params, states)
        return found | {WEIGHTS: [p if p.dtype.itemsize >= 4 else state.get("master") for p, state in pairs]}


def _places(tensors: Sequence[Any]) -> tuple[Any, ...] | None:
    """Returns what tells whether the memory of each tensor is another one; None if a subclass has it elsewhere.

    The number of bytes tells most other dtypes too: a parameter may get one under the same object, at an old address.
    """
    parts = Column(local_parts([tensor for tensor in tensors if tensor is not None]))
    if not set(map(type, parts)).issubset(PLAIN):
        return None
    return parts.addresses, [t.nbytes for t in parts], list(map(Tensor.is_contiguous, parts))
