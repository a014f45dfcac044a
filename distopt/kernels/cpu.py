"""The rules compiled for the CPU: one pass over weights, gradient and state instead of ten."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.build import library
from distopt.kernels.exact import DIGITS
from distopt.kernels.rules import SCALES, Rule, rule
from distopt.kernels.shards import PLAIN, Shards

_STEP, _MEASURE, _APPLY = range(3)
_ADDRESSES, _HYPER = 5, 7  # as cpu.c counts them


class CompiledUpdate:
    """As `ForeachUpdate`, by a function of cpu.c."""

    def __init__(self, rule: Rule, shards: Shards) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._shards = shards  # lest their memory be another's
        self._function: Any = getattr(library(), rule.name)
        self._half = bool(shards.grads) and shards.grads[0].dtype is torch.bfloat16
        columns = [shards.params, shards.grads, *(shards.buffers[name] for name in rule.buffers)]
        self._table = _table(shards.rows, columns, _ADDRESSES)
        self._hyper = array("f", [*rule.scalars.values(), *[0.0] * (_HYPER - len(rule.scalars))])
        self._scales = _scales(rule, shards)

    def step(self) -> None:
        self._call(_STEP, [1.0] * len(self.layers))

    def squares(self) -> tuple[Tensor, Tensor]:
        sums = _sums(len(self.layers), 2)
        self._call(_MEASURE, [0.0] * len(self.layers), sums.data_ptr())
        return sums[:, 0, :DIGITS], sums[:, 1, :DIGITS]

    def apply(self, factors: Tensor) -> None:
        self._call(_APPLY, factors[self.layers].tolist())

    def _call(self, mode: int, factors: list[float], sums: int = 0) -> None:
        lr = self.group["lr"]
        scales = array("f", chain(*self._scales, [lr * factor for factor in factors]))
        table, columns, hyper = map(_address, (self._table, scales, self._hyper))
        tensors = ctypes.c_int64(len(factors))
        threads = torch.get_num_threads()
        self._function(table, columns, ctypes.c_void_p(sums), tensors, hyper, self._half, mode, threads)


def compiled(name: str, shards: Shards) -> CompiledUpdate:
    """The move of a rule, by its name, on shards that fit."""
    return CompiledUpdate(rule(name, shards.group), shards)


def fits(shards: Shards) -> list[int]:
    """The indices of the shards that the kernels are for: plain tensors of float32, flat in the CPU's memory.

    Gradients of a bfloat16 parameter that has a float32 master are taken as they are.
    """
    if not any(p.is_cpu for p in shards.params) or library() is None:
        return []
    half = any(g.dtype is torch.bfloat16 and p.dtype is torch.float32 for p, g in zip(shards.params, shards.grads))
    grads = torch.bfloat16 if half else torch.float32
    columns = [(shards.params, torch.float32), (shards.grads, grads)]
    columns += [(buffers, torch.float32) for buffers in shards.buffers.values()]
    fit = [[_flat(t, dtype) for t in column] for column, dtype in columns]
    return list(compress(range(len(shards.params)), map(all, zip(*fit))))


def products(left: Sequence[Tensor], right: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The inner product of each pair of tensors that the kernels are for, in digits, and their indices.

    Args:
        left, right: Tensors, of which those are taken that are plain, contiguous and both float32 or both bfloat16.
        rows: The elements of a row of each.

    Returns:
        Digits [len(left), DIGITS], of which the rows of other tensors are 0, and the indices of those that are done.
    """
    found = torch.zeros(len(left), DIGITS, dtype=torch.float64)
    done: list[int] = []
    if not any(t.is_cpu for t in left) or library() is None:
        return found, done
    for dtype in (torch.float32, torch.bfloat16):
        fit = [i for i, (a, b) in enumerate(zip(left, right)) if _flat(a, dtype) and _flat(b, dtype)]
        if not fit:
            continue
        table = _table([rows[i] for i in fit], [[left[i] for i in fit], [right[i] for i in fit]], 2)
        sums = _sums(len(fit), 1)
        tensors, threads = ctypes.c_int64(len(fit)), torch.get_num_threads()
        function: Any = library().products  # type: ignore[union-attr]
        function(_address(table), ctypes.c_void_p(sums.data_ptr()), tensors, dtype is torch.bfloat16, threads)
        found[fit] = sums[:, 0, :DIGITS]
        done += fit
    return found, done


def _flat(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is what its memory says: a wrapper subclass has none, or another's."""
    return tensor.dtype is dtype and type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous()


def _table(rows: Sequence[int], columns: list[list[Tensor]], addresses: int) -> array[int]:
    found = [map(Tensor.data_ptr, column) for column in columns]
    nothing = [0] * (len(rows) * (addresses - len(columns)))
    return array("q", chain(map(Tensor.numel, columns[0]), rows, *found, nothing))


def _sums(tensors: int, columns: int) -> Tensor:
    """Memory for exact sums, as cpu.c has them."""
    return torch.zeros(tensors, columns, DIGITS + 1, dtype=torch.float64)


def _address(numbers: array[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


def _scales(rule: Rule, shards: Shards) -> list[list[float]]:
    """The columns of what differs between tensors; each number of steps is thought about once."""
    columns = []
    for name, scale in rule.scales.items():
        values = {step: float(scale(step)) for step in set(shards.steps)}
        columns.append([values[step] for step in shards.steps])
        if name == "rate" and shards.rates is not None:
            columns[-1] = torch.stack(shards.rates).tolist()
    return columns + [[0.0] * len(shards.params)] * (SCALES - len(columns))
