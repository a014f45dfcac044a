"""What a rule works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

# On the CPU a rule runs over slices of this many elements, so that its temporaries stay in the cache and the scratch
# memory is a constant. A GPU takes everything in one multi-tensor call.
_SLICE = 2**17


@dataclass(frozen=True)
class Shards:
    """What a rule works on: plain local tensors, list by list in the same order.

    group: the param group (its hyper-parameters). layers: the layer of each tensor. grads: of fewer bits than the
    params, where those are masters; as wide in `slices`, which rules get. buffers: the state by name.
    steps: how many steps each tensor has taken, this one included; of a capturable group 0-D tensors on the device.
    rates: factors that multiply each gradient, for rules that need norms before their state moves (LARS).
    """

    group: dict[str, Any]
    layers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    steps: list[Any]
    rates: list[Tensor] | None = None

    def slices(self) -> Iterator[Shards]:
        """The same in slices that fit in the cache; on a GPU all at once."""
        if not self.params:
            return
        if self.params[0].device.type != "cpu":
            yield self._take([(i, row) for i, row in enumerate(zip(self.params, self.grads, *self.buffers.values()))])
            return
        columns = [self.params, self.grads, *self.buffers.values()]
        whole: list[tuple[int, tuple[Tensor, ...]]] = []
        size = 0
        for i, row in enumerate(zip(*columns)):
            for cut in _cut(row):
                if whole and size + cut[0].numel() > _SLICE:
                    yield self._take(whole)
                    whole, size = [], 0
                whole.append((i, cut))
                size += cut[0].numel()
        yield self._take(whole)

    def part(self, numbers: list[int]) -> Shards:
        """Some of them, by their numbers."""

        def some(column: list[Any]) -> list[Any]:
            return [column[i] for i in numbers]

        return replace(
            self,
            layers=some(self.layers),
            params=some(self.params),
            grads=some(self.grads),
            buffers={name: some(column) for name, column in self.buffers.items()},
            steps=some(self.steps),
            rates=None if self.rates is None else some(self.rates),
        )

    def _take(self, rows: list[tuple[int, tuple[Tensor, ...]]]) -> Shards:
        params, grads, *buffers = (list(column) for column in zip(*(cut for _, cut in rows)))
        part = self.part([i for i, _ in rows])
        grads = [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, params)]
        return replace(part, params=params, grads=grads, buffers=dict(zip(self.buffers, buffers)))


def _cut(row: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
    """A parameter, its gradient and its state, cut alike where they are long and lie flat in memory."""
    if row[0].numel() <= _SLICE or not all(t.is_contiguous() for t in row):
        return [row]
    return zip(*(t.view(-1).split(_SLICE) for t in row))
