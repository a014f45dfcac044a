"""The update by C kernels on the CPU: one pass over weights, gradient and state instead of ten."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.build import library, names
from distopt.kernels.columns import PLAIN, Column
from distopt.kernels.exact import DIGITS
from distopt.kernels.rules import SCALES, Rule
from distopt.kernels.shards import Shards

SquaredNorms = tuple[Tensor, Tensor]

_STEP, _MEASURE, _APPLY, _KEEP, _APPLY_KEPT = range(5)
_ADDRESSES, _HYPER = 5, 7  # as cpu.c counts them
_HALF, NARROW = 1, 2  # flags
_CPU = torch.device("cpu")
_KINDS = (_CPU, torch.float32), (_CPU, torch.bfloat16)  # of gradients


class CompiledUpdate:
    """The update (`distopt.kernels.update.Update`) by a function of cpu.c, for shards that fit.

    Args:
        rule: The specification, with the name of the function.
        shards: The inputs.
    """

    def __init__(self, rule: Rule, shards: Shards) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._shards = shards  # keeps their memory
        self._function: Any = getattr(library(), rule.kernel)
        self._flags = _HALF if shards.grads and shards.grads[0].dtype is torch.bfloat16 else 0
        columns = [shards.params, shards.grads, *(shards.buffers[name] for name in rule.buffers)]
        self._table = _table(shards.rows, map(Column.of, columns), _ADDRESSES)
        self._measure, self._apply = _MEASURE, _APPLY
        if shards.consumes_grads and not self._flags:
            self._measure, self._apply = _KEEP, _APPLY_KEPT
        scalars, scales = names(rule.kernel)
        self._hyper = array("f", [*(rule.scalars[name] for name in scalars), *[0.0] * (_HYPER - len(scalars))])
        self._scales = _scales(rule, scales, shards)

    def step(self) -> None:
        self._call(_STEP, None)

    def squared_norms(self) -> SquaredNorms:
        sums = _sums(len(self.layers), 2)
        self._call(self._measure, None, sums.data_ptr())
        return sums[:, 0, :DIGITS], sums[:, 1, :DIGITS]

    def apply(self, ratios: Tensor | None) -> None:
        self._call(self._apply, ratios)

    def _call(self, mode: int, ratios: Tensor | None, sums: int = 0) -> None:
        lr, count = self.group["lr"], len(self.layers)
        rates = _column([lr], count) if ratios is None else _rates(lr, ratios, self.layers)
        scales = array("f", b"".join([*self._scales, rates, _column([float(self._shards.grad_factor)], count)]))
        table, columns, hyper = _address(self._table), _address(scales), _address(self._hyper)
        tensors = ctypes.c_int64(count)
        threads = torch.get_num_threads()
        self._function(table, columns, ctypes.c_void_p(sums), tensors, hyper, self._flags, mode, threads)


def compiled_update(shards: Shards) -> CompiledUpdate:
    """Returns the compiled update of shards that fit."""
    return CompiledUpdate(shards.rule, shards)


def without_rule(shards: Shards) -> Shards:
    """Returns the inputs of SGD without weight decay, whose squared norms are |p|^2 and |gradient|^2."""
    rule = Rule("sgd", scalars={"weight_decay": 0.0}, scales={"ratio": lambda step: 1.0})
    return replace(shards, rule=rule, buffers={}, consumes_grads=False)


def fits(shards: Shards) -> list[int]:
    """Returns the indices of the shards that the kernels are for: plain contiguous float32 tensors on the CPU.

    Gradients of a bfloat16 parameter with a float32 master may be bfloat16.
    """
    if library() is None or not any(p.is_cpu for p in shards.params):
        return []
    kinds = {Column.of(column).kind for column in (shards.params, *shards.buffers.values())}
    if kinds == {(_CPU, torch.float32)} and Column.of(shards.grads).kind in _KINDS:
        return list(range(len(shards.params)))
    bfloat16 = any(g.dtype is torch.bfloat16 and p.dtype is torch.float32 for p, g in zip(shards.params, shards.grads))
    grads = torch.bfloat16 if bfloat16 else torch.float32
    columns = [(shards.params, torch.float32), (shards.grads, grads)]
    columns += [(buffers, torch.float32) for buffers in shards.buffers.values()]
    fit = [[_flat(t, dtype) for t in column] for column, dtype in columns]
    return list(compress(range(len(shards.params)), map(all, zip(*fit))))


def products(left: Sequence[Tensor], right: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Computes the inner product of each pair of tensors that the kernels are for, in digits.

    Args:
        left: Tensors; the kernels are for pairs that are plain, contiguous and both float32 or both bfloat16.
        right: Their partners, of the same shapes.
        rows: The elements of a row of each.

    Returns:
        Digits of shape [len(left), DIGITS], 0 for the other pairs, and the indices of the pairs that are done.
    """
    found = torch.zeros(len(left), DIGITS, dtype=torch.float64)
    done: list[int] = []
    if library() is None or not any(t.is_cpu for t in left):
        return found, done
    a = Column.of(left)
    b = a if right is left else Column.of(right)
    if a.kind == b.kind and a.kind in _KINDS:
        return _products(a, b, rows), list(range(len(a)))
    for dtype in (torch.float32, torch.bfloat16):
        fit = [i for i, (a, b) in enumerate(zip(left, right)) if _flat(a, dtype) and _flat(b, dtype)]
        if not fit:
            continue
        found[fit] = _products(Column(left[i] for i in fit), Column(right[i] for i in fit), [rows[i] for i in fit])
        done += fit
    return found, done


def _products(left: Column, right: Column, rows: Sequence[int]) -> Tensor:
    """Computes the digits of the inner products of tensors of one dtype."""
    table, sums = _table(rows, [left, right], 2), _sums(len(left), 1)
    tensors, threads = ctypes.c_int64(len(left)), torch.get_num_threads()
    function: Any = library().products  # type: ignore[union-attr]
    half = left[0].dtype is torch.bfloat16
    function(_address(table), ctypes.c_void_p(sums.data_ptr()), tensors, half, threads)
    return sums[:, 0, :DIGITS]


def _flat(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a kernel may read the tensor's memory; that of a wrapper subclass is empty, or another's."""
    return tensor.dtype is dtype and type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous()


def _table(rows: Sequence[int], columns: Iterable[Column], addresses: int) -> array[int]:
    first, *others = columns
    unused = array("q", [0]) * (len(rows) * (addresses - 1 - len(others)))
    found = [first.numels, array("q", rows), first.addresses, *(column.addresses for column in others), unused]
    return array("q", b"".join(found))


def _sums(tensors: int, columns: int) -> Tensor:
    """Returns memory for exact sums, in the layout of cpu.c."""
    return torch.zeros(tensors, columns, DIGITS + 1, dtype=torch.float64)


def _address(values: array[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.buffer_info()[0])


def _scales(rule: Rule, names: Sequence[str], shards: Shards) -> list[array[float]]:
    """Returns the columns of values that differ between tensors, computed once for each number of steps."""
    columns, factors, count = [], rule.factors, len(shards.params)
    for name in names:
        if name == "ratio" and shards.ratios is not None:
            columns.append(_column(torch.stack(shards.ratios).tolist(), count))
            continue
        values = {step: float(factors[name](step)) for step in set(shards.steps)}
        of_each = [*values.values()] if len(values) == 1 else [values[step] for step in shards.steps]
        columns.append(_column(of_each, count))
    return columns + [_column([0.0], count)] * (SCALES - len(columns))


def _rates(lr: float, ratios: Tensor, layers: Sequence[int]) -> array[float]:
    """Returns the factor of the direction of each tensor, given the trust ratios of all layers of the model."""
    of_layer = ratios.tolist()
    return array("f", [lr * of_layer[layer] for layer in layers])


def _column(values: list[float], count: int) -> array[float]:
    """Returns a value for each tensor, given these or one for all."""
    return array("f", values) if len(values) == count else array("f", values) * count
