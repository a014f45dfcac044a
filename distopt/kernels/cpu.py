"""The rules compiled for the CPU: one pass over weights, gradient and state instead of ten."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.compiler import library
from distopt.shards import Shards

_STEP, _MEASURE, _APPLY = range(3)
_ADDRESSES, _HYPER = 5, 6  # as cpu.c counts them


class CompiledMove:
    """As `Move`, by a function of cpu.c.

    buffers: the names of its state buffers. hyper: its hyper-parameters. scales: two columns, of what differs
    between tensors.
    """

    def __init__(
        self, function: str, shards: Shards, buffers: list[str], hyper: list[float], scales: list[list[float]]
    ) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._shards, self._scales = shards, scales  # the shards, lest their memory be another's
        self._function: Any = getattr(library(), function)
        self._half = bool(shards.grads) and shards.grads[0].dtype is torch.bfloat16
        columns = [shards.params, shards.grads, *(shards.buffers[name] for name in buffers)]
        addresses = [map(Tensor.data_ptr, column) for column in columns]
        nothing = [0] * (len(shards.params) * (_ADDRESSES - len(columns)))
        self._table = array("q", chain(map(Tensor.numel, shards.params), *addresses, nothing))
        self._hyper = array("f", hyper + [0.0] * (_HYPER - len(hyper)))

    def step(self) -> None:
        self._call(_STEP, [1.0] * len(self.layers))

    def squares(self) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(self.layers), 2, dtype=torch.float64)
        self._call(_MEASURE, [0.0] * len(self.layers), sums.data_ptr())
        return sums[:, 0], sums[:, 1]

    def apply(self, factors: Tensor) -> None:
        self._call(_APPLY, factors[self.layers].tolist())

    def _call(self, mode: int, factors: list[float], squares: int = 0) -> None:
        lr = self.group["lr"]
        scales = array("f", chain(*self._scales, [lr * factor for factor in factors]))
        table, columns, hyper = (ctypes.c_void_p(a.buffer_info()[0]) for a in (self._table, scales, self._hyper))
        tensors = ctypes.c_int64(len(factors))
        threads = torch.get_num_threads()
        self._function(table, columns, ctypes.c_void_p(squares), tensors, hyper, self._half, mode, threads)


def compiled(name: str, shards: Shards) -> CompiledMove:
    """The move of a rule, by its name, on shards that fit."""
    return _RULES[name](shards)


def fits(shards: Shards) -> list[int]:
    """The numbers of the shards that the kernels are for: float32, flat in the CPU's memory.

    Gradients of a bfloat16 parameter that has a float32 master are taken as they are.
    """
    if not any(p.is_cpu for p in shards.params) or library() is None:
        return []
    half = any(g.dtype is torch.bfloat16 and p.dtype is torch.float32 for p, g in zip(shards.params, shards.grads))
    grads = torch.bfloat16 if half else torch.float32
    columns = [(shards.params, torch.float32), (shards.grads, grads)]
    columns += [(buffers, torch.float32) for buffers in shards.buffers.values()]
    fit = [[t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in column] for column, dtype in columns]
    return list(compress(range(len(shards.params)), map(all, zip(*fit))))


def _adam(shards: Shards, coupled: float, decoupled: float) -> CompiledMove:
    beta1, beta2 = shards.group["betas"]
    bias = {step: (1.0 / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5) for step in set(shards.steps)}
    scales = [[bias[step][i] for step in shards.steps] for i in range(2)]
    hyper = [coupled, beta1, beta2, shards.group["eps"], decoupled]
    return CompiledMove("adam", shards, ["exp_avg", "exp_avg_sq"], hyper, scales)


def _sgd(shards: Shards) -> CompiledMove:
    group = shards.group
    ones = [1.0] * len(shards.params)
    rates = ones if shards.rates is None else torch.stack(shards.rates).tolist()
    if not group["momentum"]:
        return CompiledMove("plain", shards, [], [group["weight_decay"]], [ones, rates])
    fresh = [1.0 if step == 1.0 else 1.0 - group["dampening"] for step in shards.steps]
    hyper = [group["weight_decay"], group["momentum"], float(group["nesterov"])]
    return CompiledMove("sgd", shards, ["momentum_buffer"], hyper, [fresh, rates])


def _adagrad(shards: Shards) -> CompiledMove:
    group = shards.group
    falls = [1.0 / (1.0 + (step - 1.0) * group["lr_decay"]) for step in shards.steps]
    return CompiledMove("adagrad", shards, ["sum"], [group["weight_decay"], group["eps"]], [falls, falls])


def _rmsprop(shards: Shards) -> CompiledMove:
    group = shards.group
    centered, momentum = ("_centered" if group["centered"] else ""), ("_momentum" if group["momentum"] else "")
    hyper = [group["weight_decay"], group["alpha"], group["eps"], group["momentum"]]
    ones = [1.0] * len(shards.params)
    return CompiledMove(f"rmsprop{centered}{momentum}", shards, list(shards.buffers), hyper, [ones, ones])


def _norms(shards: Shards) -> CompiledMove:
    """Its `squares` are those of weights and gradients; no state moves."""
    ones = [1.0] * len(shards.params)
    return CompiledMove("plain", shards, [], [0.0], [ones, ones])


_RULES: dict[str, Callable[[Shards], CompiledMove]] = {
    "sgd": _sgd,
    "adam": lambda shards: _adam(shards, shards.group["weight_decay"], 0.0),
    "adamw": lambda shards: _adam(shards, 0.0, shards.group["weight_decay"]),
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "norms": _norms,
}
