"""The inputs of an update rule: the local shards of one param group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.blocks import SIGNED, SQUARES, Form
from distopt.kernels.columns import Column
from distopt.kernels.narrow import Narrow
from distopt.kernels.rules import Rule

# On the CPU a rule runs over slices of this many elements, so that its temporaries stay in the cache and the scratch
# memory is a constant. A GPU takes everything in one multi-tensor call, but for narrow shards, whose float32 copies are
# scratch memory.
_SLICE, _GPU_SLICE = 2**17, 2**24


@dataclass(frozen=True)
class Shards:
    """Plain local tensors of one param group: lists in the same order, one entry for each part of a layer.

    Attributes:
        group: The param group, with its hyper-parameters.
        rule: The specification of the rule for this group.
        layers: The index of the layer of each tensor.
        params: The weights, or their float32 masters, of any shape; as they are stored, like the buffers.
        grads: The gradients, of the shape of the params; possibly of 16 bits where the params are masters. `slices`,
            which rules get, has them in the dtype of the params.
        buffers: The state by name, of the shape of the params, or flat codes of it (`form`); of a buffer with a slot of
            its own (`Rule.slots`) the full tensor, or None for a parameter that has none.
        steps: How many steps each tensor has taken, this one included; for a capturable group 0-D tensors on the
            device.
        sums: The running sums of the rule by name, floats in the order of the tensors.
        grad_factor: What a rule multiplies each gradient by before anything else, rounded as if the product had been
            stored: the factor of clipping, negative for `maximize`. A float, or a 0-D float64 tensor on the device,
            which nothing waits for.
        consumes_grads: Whether an update may use the memory of the gradients, whose values are lost then.
        rows: The elements of a row (one index of dimension 0) of each tensor's layer, with which a sum over a layer is
            the same bits however it is sharded between rows. By default those of the tensors themselves.
        ratios: Trust ratios, 0-D tensors, that multiply each gradient before the state changes (LARS).
        narrow: What is known beside of weights and state that are stored in fewer than 32 bits; None if none are.
    """

    group: dict[str, Any]
    rule: Rule
    layers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    steps: list[Any]
    rows: list[int] = None  # type: ignore[assignment]
    ratios: list[Tensor] | None = None
    sums: dict[str, list[float]] = field(default_factory=dict)
    grad_factor: float | Tensor = 1.0
    consumes_grads: bool = False
    narrow: Narrow | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", [row_of(p.shape) for p in self.params])
        buffers = {name: Column.of(buffers) for name, buffers in self.buffers.items()}
        for name, value in (("params", Column.of(self.params)), ("grads", Column.of(self.grads)), ("buffers", buffers)):
            object.__setattr__(self, name, value)

    @property
    def inputs(self) -> dict[str, Any]:
        """The buffers, scalars, scales, divisors and sums of the rule by name, for a call of its function.

        Scales, divisors and sums are lists with a float for each tensor; `ratio` is `ratios`, or None.
        """
        scales = {**self.rule.scales, **self.rule.divisors}
        values = {name: [scale(step) for step in self.steps] for name, scale in scales.items() if name != "ratio"}
        ratio = {"ratio": self.ratios} if "ratio" in scales else {}
        return {**self.buffers, **self.rule.scalars, **values, **self.sums, **ratio}

    def form(self, name: str, i: int) -> Form | None:
        """Returns the form of a state buffer of one tensor, if it is stored as codes of blocks."""
        stored = self.buffers[name][i] if name in self.buffers else None
        if stored is None or stored.dtype is not torch.uint8 or self.narrow is None:
            return None
        scale, numel = self.narrow.extras[name][i], self.params[i].numel()
        assert scale is not None
        kind = SIGNED if name in self.rule.signed else SQUARES
        return Form(kind, 8 * stored.numel() // numel, numel // scale.numel())

    def slices(self) -> Iterator[Shards]:
        """Yields the same tensors in slices that fit in the cache; on a GPU all at once."""
        if not self.params:
            return
        on_cpu = self.params[0].is_cpu
        if not on_cpu and self.narrow is None:
            yield self._take([(i, 0, tensors) for i, tensors in enumerate(zip(*self._columns))])
            return
        most = _SLICE if on_cpu else _GPU_SLICE
        taken: list[_Slice] = []
        size = 0
        for i, tensors in enumerate(zip(*self._columns)):
            for start, piece in _sliced(tensors, self.rows[i], most):
                if taken and size + piece[0].numel() > most:
                    yield self._take(taken)
                    taken, size = [], 0
                taken.append((i, start, piece))
                size += piece[0].numel()
        yield self._take(taken)

    def part(self, indices: list[int]) -> Shards:
        """Returns the tensors with these indices."""

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
            ratios=None if self.ratios is None else some(self.ratios),
            sums={name: some(column) for name, column in self.sums.items()},
            narrow=None if self.narrow is None else self.narrow.part(indices),
        )

    def scaled(self) -> Shards:
        """Returns the same shards with `grad_factor` in the gradients, which are new tensors unless it is 1."""
        if not isinstance(self.grad_factor, Tensor) and self.grad_factor == 1.0:
            return self
        return replace(self, grads=multiplied(self.grads, self.grad_factor), grad_factor=1.0)

    @property
    def _columns(self) -> list[list[Any]]:
        extras = {} if self.narrow is None else self.narrow.extras
        return [self.params, self.grads, *self.buffers.values(), *extras.values()]

    def _take(self, taken: list[_Slice]) -> Shards:
        params, grads, *others = (list(column) for column in zip(*(tensors for _, _, tensors in taken)))
        part = self.part([i for i, _, _ in taken])
        grads = [g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(grads, map(computed, params))]
        narrow = part.narrow
        if narrow is not None:
            windows = [at._replace(first=at.first + start) for at, (_, start, _) in zip(narrow.windows, taken)]
            extras = dict(zip(narrow.extras, others[len(self.buffers) :]))
            narrow = replace(narrow, windows=windows, extras=extras)
        buffers = dict(zip(self.buffers, others))
        return replace(part, params=params, grads=grads, buffers=buffers, narrow=narrow).scaled()


def multiplied(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Returns the products of tensors and a scalar, which is rounded to the dtype of each."""
    if not isinstance(factor, Tensor):
        return list(torch._foreach_mul(tensors, factor)) if tensors else []
    found = list(tensors)
    for dtype in {t.dtype for t in tensors}:
        alike = [i for i, t in enumerate(tensors) if t.dtype is dtype]
        products = torch._foreach_mul([tensors[i] for i in alike], factor.to(dtype))
        for i, product in zip(alike, products):
            found[i] = product
    return found


def row_of(shape: Sequence[int]) -> int:
    """Returns the elements of one index of dimension 0, at least 1."""
    return max(1, math.prod(shape[1:]))


_Slice = tuple[int, int, tuple[Any, ...]]  # the index of a shard, the first element, the tensors


def computed(param: Tensor) -> torch.dtype:
    """Returns the dtype in which the update of a weight is computed."""
    return torch.promote_types(param.dtype, torch.float32)


def _sliced(tensors: tuple[Any, ...], row: int, most: int) -> Iterable[tuple[int, tuple[Any, ...]]]:
    """Slices a parameter, its gradient and its state alike, if they are long and contiguous.

    A slice is a number of rows; a longer row is sliced on its own, from its start. A tensor of fewer elements has one
    for each of some consecutive ones of the parameter.

    Yields:
        The first element of a slice, and the slices of the tensors; None of those that are None.
    """
    numel = tensors[0].numel()
    if numel <= most or not all(t is None or t.is_contiguous() for t in tensors):
        return [(0, tensors)]
    step = max(row, most // row * row)
    starts = [start for first in range(0, numel, step) for start in range(first, min(first + step, numel), most)]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], numel])]
    return zip(starts, zip(*(_pieces(t, sizes, numel) for t in tensors)))


def _pieces(tensor: Tensor | None, sizes: list[int], numel: int) -> Sequence[Tensor | None]:
    if tensor is None:
        return [None] * len(sizes)
    return tensor.view(-1).split([size * tensor.numel() // numel for size in sizes])
