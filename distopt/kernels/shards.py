"""What a rule works on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors that are what their memory says; subclasses may hold anything
# On the CPU a rule runs over slices of this many elements, so that its temporaries stay in the cache and the scratch
# memory is a constant. A GPU takes everything in one multi-tensor call.
_SLICE = 2**17


@dataclass(frozen=True)
class Shards:
    """What a rule works on: plain local tensors, list by list in the same order.

    group: the param group (its hyper-parameters). layers: the layer of each tensor. grads: of fewer bits than the
    params, where those are masters; as wide in `slices`, which rules get. buffers: the state by name.
    steps: how many steps each tensor has taken, this one included; of a capturable group 0-D tensors on the device.
    rows: the elements of a row of each tensor's layer, one index of its dimension 0: a sum over a layer is the same
        bits however it is sharded between rows. Those of the tensors themselves if not given.
    rates: factors that multiply each gradient, for rules that need norms before their state moves (LARS).
    """

    group: dict[str, Any]
    layers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    steps: list[Any]
    rows: list[int] = None  # type: ignore[assignment]
    rates: list[Tensor] | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", [row_of(p.shape) for p in self.params])

    def slices(self) -> Iterator[Shards]:
        """The same in slices that fit in the cache; on a GPU all at once."""
        if not self.params:
            return
        if self.params[0].device.type != "cpu":
            yield self._take([(i, tensors) for i, tensors in enumerate(zip(*self._columns))])
            return
        whole: list[tuple[int, tuple[Tensor, ...]]] = []
        size = 0
        for i, tensors in enumerate(zip(*self._columns)):
            for cut in _cut(tensors, self.rows[i]):
                if whole and size + cut[0].numel() > _SLICE:
                    yield self._take(whole)
                    whole, size = [], 0
                whole.append((i, cut))
                size += cut[0].numel()
        yield self._take(whole)

    def part(self, indices: list[int]) -> Shards:
        """Some of them, by their indices."""

        def some(column: list[Any]) -> list[Any]:
            return [column[i] for i in indices]

        return replace(
            self,
            layers=some(self.layers),
            params=some(self.params),
            grads=some(self.grads),
            buffers={name: some(column) for name, column in self.buffers.items()},
            steps=some(self.steps),
            rows=some(self.rows),
            rates=None if self.rates is None else some(self.rates),
        )

    @property
    def _columns(self) -> list[list[Tensor]]:
        return [self.params, self.grads, *self.buffers.values()]

    def _take(self, taken: list[tuple[int, tuple[Tensor, ...]]]) -> Shards:
        params, grads, *buffers = (list(column) for column in zip(*(tensors for _, tensors in taken)))
        part = self.part([i for i, _ in taken])
        grads = [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, params)]
        return replace(part, params=params, grads=grads, buffers=dict(zip(self.buffers, buffers)))


def row_of(shape: Sequence[int]) -> int:
    """The elements of one index of dimension 0, at least 1."""
    return max(1, math.prod(shape[1:]))


def _cut(tensors: tuple[Tensor, ...], row: int) -> Iterable[tuple[Tensor, ...]]:
    """A parameter, its gradient and its state, sliced alike where they are long and contiguous.

    A slice is a number of rows; a longer row is sliced by itself, from its start.
    """
    numel = tensors[0].numel()
    if numel <= _SLICE or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    step = max(row, _SLICE // row * row)
    starts = [start for first in range(0, numel, step) for start in range(first, min(first + step, numel), _SLICE)]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], numel])]
    return zip(*(t.view(-1).split(sizes) for t in tensors))
