"""The update of matrices by their owners, exchange by exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.narrow_update import read, write
from distopt.kernels.shards import Shards
from distopt.kernels.update import Directions, ForeachUpdate, SquaredNorms, Update
from distopt.layout.matrix_exchange import MatrixExchange

# The shards of the matrices that the rule is to compute with, of some of the shards; it updates their state.
Prepare = Callable[[Shards], Sequence[Tensor]]
Compute = Callable[[Tensor], Tensor]


def matrix_updates(
    exchanges: Sequence[MatrixExchange],
    shards: Shards,
    prepare: Prepare,
    compute: Compute,
    directions: Directions,
    dtype: torch.dtype,
) -> list[Update]:
    """Returns an update for each exchange. Every rank has to apply all of them, in this order.

    While the matrices of one exchange are computed, those of the next one are on their way, so that at most two
    exchanges take memory.

    Args:
        exchanges: Those of all layers of the param group.
        shards: This rank's shards of the layers that have a gradient.
        prepare: Gives what is sent to the owners.
        compute: The rule, on one full matrix.
        directions: Gives the directions, of shards whose gradients are those of `compute`'s results.
        dtype: The dtype of the matrices.
    """
    index = {layer: i for i, layer in enumerate(shards.layers)}

    def part(exchange: MatrixExchange) -> Shards:
        return shards.part([index[layer] for layer in exchange.layers if layer in index])

    def prepared(exchange: MatrixExchange) -> dict[int, Tensor]:
        some = part(exchange).scaled()
        wide = read(some)  # of narrow momentum, a copy
        found = prepare(wide) if some.layers else ()
        write(some, wide)
        return dict(zip(some.layers, found))

    steps = _pipeline(exchanges, prepared, compute, dtype)

    def results(exchange: MatrixExchange) -> Shards:
        some, fill = part(exchange), next(steps)
        grads = [torch.empty_like(p, dtype=dtype) for p in some.params]
        fill(dict(zip(some.layers, grads)))
        return replace(some, grads=grads, buffers={}, grad_factor=1.0, narrow=None)

    return [MatrixUpdate(directions, shards.group, lambda e=e: results(e)) for e in exchanges]  # type: ignore[misc]


class MatrixUpdate(ForeachUpdate):
    """The update of the shards of an exchange, once its results have arrived.

    Args:
        directions: Gives the directions of the shards.
        group: The param group.
        arrived: Waits, and returns the shards.
    """

    def __init__(self, directions: Directions, group: dict[str, Any], arrived: Callable[[], Shards]) -> None:
        self.group, self._directions, self._arrived = group, directions, arrived
        self._measured = []
        self._layers: list[int] = []

    @property
    def layers(self) -> list[int]:
        return self._layers

    def step(self) -> None:
        self._shards = self._arrived()
        super().step()
        del self._shards  # its memory is that of a later exchange

    def squared_norms(self) -> SquaredNorms:
        self._shards = self._arrived()
        squares = super().squared_norms()
        self._layers = super().layers
        del self._shards
        return squares

    def apply(self, ratios: Tensor | None) -> None:
        super().apply(ratios)
        self._measured = []


def _pipeline(
    exchanges: Sequence[MatrixExchange],
    prepared: Callable[[MatrixExchange], Mapping[int, Tensor]],
    compute: Compute,
    dtype: torch.dtype,
) -> Iterator[Callable[[Mapping[int, Tensor]], None]]:
    """Yields, for one exchange after another, the function that waits for its results."""
    coming = (exchange.gather(prepared(exchange), dtype) for exchange in exchanges)  # each starts when it is asked for
    ahead = next(coming, None)
    returning = None
    for exchange in exchanges:
        assert ahead is not None
        matrices = ahead()
        ahead = next(coming, None)
        back = exchange.scatter({i: compute(matrices.pop(i)) for i in [*matrices]}, dtype)
        if returning is not None:
            yield returning
        returning = back
    if returning is not None:
        yield returning
