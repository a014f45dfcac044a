"""State of a member of the SAM family, stored in the state of the optimizer inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.layout import ShardLayout, fit


@dataclass
class _Staged:
    """New values of a state buffer, as shards by parameter, until the step is taken."""

    layout: ShardLayout
    name: str
    values: dict[Tensor, list[Tensor]]


class StateBuffers:
    """Buffers that SAM adds to the state of the optimizer inside, which saves and loads them with its own.

    New values are staged during the passes and written after the step, so that a skipped step changes no state, and
    only for parameters that were stepped, since torch's optimizers create no state for others.

    Args:
        optimizer: The optimizer inside.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._staged: _Staged | None = None

    def create(self, layout: ShardLayout, params: Iterable[Tensor], name: str) -> None:
        """Creates a buffer of zeros for each parameter that has none, laid out like its state."""
        state = self._optimizer.state
        for p in params:
            if name not in state[p]:
                state[p][name] = layout.zeros(p)

    def shards(self, layout: ShardLayout, params: Iterable[Tensor], name: str) -> list[Tensor]:
        """Returns the local shards of a buffer, for reading; zeros for parameters that have none yet."""
        state, shards = self._optimizer.state, []
        for p in params:
            stored = state.get(p, {}).get(name)
            value = layout.zeros(p) if stored is None else fit(layout, p, stored, name)
            if stored is not None and stored is not value:  # loaded, or created for another layout
                state[p][name] = value
            shards += layout.split(p, value)
        return shards

    def stage(self, layout: ShardLayout, params: Iterable[Tensor], name: str, values: Sequence[Tensor]) -> None:
        """Stages new values of a buffer, as shards of these parameters, until `commit`."""
        shards = iter(values)
        self._staged = _Staged(layout, name, {p: [next(shards) for _ in layout.segments[p]] for p in params})

    @property
    def staged(self) -> bool:
        """Whether values are staged."""
        return self._staged is not None

    def discard(self) -> None:
        """Drops staged values, those of a step that was skipped."""
        self._staged = None

    def commit(self, stepped: Iterable[Tensor]) -> None:
        """Writes the staged values of the parameters that were stepped."""
        staged, self._staged = self._staged, None
        if staged is None:
            return
        params = [p for p in stepped if p in staged.values]
        self.create(staged.layout, params, staged.name)
        values = [value for p in params for value in staged.values[p]]
        for shard, value in zip(self.shards(staged.layout, params, staged.name), values, strict=True):
            shard.copy_(value)
