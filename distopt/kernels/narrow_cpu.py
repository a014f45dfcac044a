"""The update of narrow shards by C kernels on the CPU, which convert a few numbers at a time to float32 and back."""

from __future__ import annotations

import ctypes
from array import array
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distopt.kernels import cpu, rounding
from distopt.kernels.blocks import SIGNED, SQUARES, Form
from distopt.kernels.columns import PLAIN
from distopt.kernels.cpu import NARROW, CompiledUpdate
from distopt.kernels.narrow import WEIGHTS
from distopt.kernels.shards import Shards
from distopt.kernels.window import Window

_STEP, _MEASURE, _STORES = 0, 1, 4  # as cpu.c counts them
_FLOAT32, _BFLOAT16, _REMAINDER = range(3)
_OF_BLOCKS = {(SIGNED, 8): 3, (SQUARES, 8): 4, (SIGNED, 4): 5, (SQUARES, 4): 6}


class NarrowCompiledUpdate(CompiledUpdate):
    """The update (`distopt.kernels.update.Update`) by a function of cpu.c, for narrow shards that fit.

    A trust ratio needs norms before the first number is written, so that the directions are computed twice.

    Args:
        shards: The inputs of the rule, with gradients of one dtype.
    """

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards.rule, shards)
        assert shards.narrow is not None
        self._flags |= NARROW
        self._measure, self._apply = _MEASURE, _STEP
        names = [WEIGHTS, *shards.rule.buffers]
        stored = [shards.params, *(shards.buffers[name] for name in shards.rule.buffers)]
        none: list[Any] = [None] * len(shards.params)
        extras = [shards.narrow.extras.get(name, none) for name in names]
        pairs = list(zip(shards.narrow.keys, map(int, shards.steps)))
        addresses = [[0 if t is None else t.data_ptr() for t in column] for column in extras]
        formats = [
            [_format(shards.form(name, i), *pair) for i, pair in enumerate(zip(*both))]
            for name, *both in zip(names, stored, extras)
        ]
        keys = [[rounding.key_of(*pair, slot) for pair in pairs] for slot in range(len(names))]
        unused = [[0] * len(none)] * (_STORES - len(names))
        columns = [column for of_stores in (addresses, formats, keys) for column in (*of_stores, *unused)]
        columns += [[int(at[i]) for at in shards.narrow.windows] for i in range(3)]
        self._table += array("q", chain(*columns))


def narrow_fits(shards: Shards) -> dict[torch.dtype, list[int]]:
    """Returns the indices of the narrow shards that the kernels are for, by the dtype of their gradients.

    They are for plain contiguous tensors on the CPU, of float32, bfloat16 or codes.
    """
    found: dict[torch.dtype, list[int]] = {}
    if cpu.library() is None or shards.narrow is None:
        return found
    extras = zip(*shards.narrow.extras.values())
    for i, (row, extra) in enumerate(zip(zip(shards.params, shards.grads, *shards.buffers.values()), extras)):
        if all(map(_readable, (*row, *(t for t in extra if t is not None)))):
            found.setdefault(shards.grads[i].dtype, []).append(i)
    return found


def _readable(tensor: Tensor) -> bool:
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.uint8)
    return known and type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous()


def load(codes: Tensor, scale: Tensor, form: Form, row: int) -> Tensor | None:
    """Returns the float32 values, flat, of codes and scales on the CPU; None without a compiler."""
    values = torch.empty(codes.numel() * form.per_code)
    return values if _convert(codes, scale, values, form, row, 0, Window.run(0, 1), False) else None


def save(values: Tensor, codes: Tensor, scale: Tensor, form: Form, row: int, key: int, window: Window) -> bool:
    """Writes the codes and scales of float32 values on the CPU; returns whether it can."""
    return _convert(codes, scale, values, form, row, key, window, True)


def _convert(
    codes: Tensor, scale: Tensor, values: Tensor, form: Form, row: int, key: int, window: Window, saves: bool
) -> bool:
    tensors = (codes, scale, values)
    if cpu.library() is None or not all(map(_readable, tensors)) or values.dtype is not torch.float32:
        return False
    function: Any = cpu.library().convert  # type: ignore[union-attr]
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    integers = [ctypes.c_int64(n) for n in (*window, _OF_BLOCKS[form.kind, form.bits], values.numel(), row)]
    function(*addresses, *integers, ctypes.c_uint32(key), int(saves), torch.get_num_threads())
    return True


def _format(form: Form | None, stored: Tensor, extra: Tensor | None) -> int:
    if form is not None:
        return _OF_BLOCKS[form.kind, form.bits]
    if stored.dtype is torch.float32:
        return _FLOAT32
    return _BFLOAT16 if extra is None else _REMAINDER
