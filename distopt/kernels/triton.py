"""The update by Triton kernels on a GPU: one launch for all tensors of a param group, which waits for nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from distopt.kernels import exact
from distopt.kernels.columns import PLAIN, Column
from distopt.kernels.device_lists import DeviceLists, sent
from distopt.kernels.rules import SCALES
from distopt.kernels.shards import Shards

DEVICES = ("cuda",)  # torch's name for AMD's too
_GRADS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 16  # bytes: the most that one load takes
_GROUPS = 16, 256  # the fewest and the most elements that are summed in float32
_lists = DeviceLists()  # also of addresses, which are integers too, so that an entry is never stale


@functools.cache
def kernels() -> Any:
    """Returns the module of the kernels; None where Triton is not installed, or DISTOPT_KERNELS=off."""
    if os.environ.get("DISTOPT_KERNELS") == "off" or importlib.util.find_spec("triton") is None:
        return None
    from distopt.kernels import triton_kernels  # here, since Triton takes longer to import than all of distopt

    return triton_kernels


class TritonUpdate:
    """The update (`distopt.kernels.update.Update`) by a function of triton_kernels.py, for shards of one kind.

    Norms are the same bits however layers are sharded by rows, if a row is a multiple of 16 elements; others may differ
    by rounding.
    """

    def __init__(self, shards: Shards) -> None:
        rule = shards.rule
        self.group, self.layers = shards.group, shards.layers
        self._device = shards.params[0].device
        numels = [p.numel() for p in shards.params]
        *firsts, self._pieces = accumulate((-(-numel // kernels().PIECE) for numel in numels), initial=0)
        buffers = [shards.buffers[name] for name in rule.buffers]
        columns = [[t.data_ptr() for t in tensors] for tensors in (shards.params, shards.grads, *buffers)]
        aligned = all(address % _ALIGNMENT == 0 for column in columns for address in column)
        columns += [[0] * len(numels)] * (5 - len(columns))
        self._table = _lists.get(tuple(chain.from_iterable(zip(*columns, numels, firsts))), self._device)
        self._scales = sent(_scales(shards), self._device)
        if shards.ratios is not None:
            self._scales[:, list(rule.factors).index("ratio")] = torch.stack(shards.ratios)
        if isinstance(shards.grad_factor, Tensor):
            self._scales[:, 3] = shards.grad_factor
        grad = shards.grads[0].dtype
        fewest, most = _GROUPS
        self._sum = max(fewest, math.gcd(most, *shards.rows))
        self._rule = {
            "h": tuple(rule.scalars.values()),
            "RULE": kernels().RULES[rule.kernel],
            "BUFFERS": len(buffers),
            "GRAD": getattr(kernels().tl, _GRADS[grad]),
            "ALIGNMENT": _ALIGNMENT if aligned else grad.itemsize,
            "GROUP": self._sum,
        }

    def step(self) -> None:
        self._launch(kernels().STEP, self._scales)

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        pieces = torch.empty(self._pieces, 2, exact.DIGITS, dtype=torch.float64, device=self._device)
        self._launch(kernels().MEASURE, self._scales, pieces)
        totals = torch.empty(len(self.layers), 2, 2, exact.DIGITS, dtype=torch.float64, device=self._device)
        self._add_up(pieces, totals)
        digits, more = totals.unbind(2)
        digits[..., 1:] += more[..., :-1]
        digits = exact.carried(digits)
        return digits[:, 0], digits[:, 1]

    def apply(self, ratios: Tensor | None) -> None:
        scales = self._scales.clone()
        if ratios is not None:
            scales[:, 2] *= ratios[_lists.get(tuple(self.layers), self._device)]
        self._launch(kernels().APPLY, scales)

    def _launch(self, mode: int, scales: Tensor, pieces: Tensor | None = None) -> None:
        with _on(self._device):
            kernels().walk[(self._pieces,)](
                self._table,
                scales,
                scales if pieces is None else pieces,
                len(self.layers),
                MODE=mode,
                SIZE=kernels().PIECE,
                num_warps=kernels().WARPS,
                enable_fp_fusion=True,  # Triton 3.9 warns of another default to come
                **self._rule,
            )

    def _add_up(self, pieces: Tensor, totals: Tensor) -> None:
        with _on(self._device):
            # A piece's digits are below 2^38 for each of its sums: added up, BLOCK of them are below 2^53.
            block = min(512, 4 * self._sum)
            kernels().add_up[(len(self.layers), 2)](
                self._table, pieces, totals, SIZE=kernels().PIECE, BLOCK=block, num_warps=8, enable_fp_fusion=True
            )


def triton_updates(shards: Shards) -> tuple[list[TritonUpdate], list[int]]:
    """Returns the updates of the shards that the kernels are for, and the indices of the others.

    The kernels are for plain tensors of float32 weights and state, contiguous in a GPU's memory; gradients may have 16
    bits.
    """
    kinds = _kinds(shards)
    left = kinds.pop(None, [])
    if kinds and kernels() is None:
        return [], list(range(len(shards.params)))
    alike = [shards if len(indices) == len(shards.params) else shards.part(indices) for indices in kinds.values()]
    return [TritonUpdate(part) for part in alike], left


def unfit(shards: Shards) -> list[int]:
    """Returns the indices of the shards that the kernels are not for; all of them where there are no kernels."""
    left = _kinds(shards).get(None, [])
    return left if kernels() is not None else list(range(len(shards.params)))


def _kinds(shards: Shards) -> dict[Any, list[int]]:
    """Returns the indices of the shards of each launch, by their kind; None for those that the kernels are not for."""
    kind = Column.of(shards.params).kind
    if kind is not None and kind[0].type not in DEVICES:
        return {None: list(range(len(shards.params)))}
    kinds: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(shards.params, shards.grads, *shards.buffers.values())):
        kinds.setdefault(_kind(*row), []).append(i)
    return kinds


def _kind(param: Tensor, grad: Tensor, *buffers: Tensor) -> Any:
    """Returns what the tensors of one launch have in common; None if the kernels are not for these."""
    tensors = (param, grad, *buffers)
    if param.device.type not in DEVICES or grad.dtype not in _GRADS:
        return None
    if not all(t.is_contiguous() and (t is grad or t.dtype is torch.float32) for t in tensors):
        return None
    if not all(type(t) in PLAIN for t in tensors):  # the memory of a wrapper subclass is empty, or another's
        return None
    return param.device, grad.dtype, all(t.data_ptr() % _ALIGNMENT == 0 for t in tensors)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scales(shards: Shards) -> Tensor:
    """Returns a row for each tensor: the rule's factors, lr and the factor of the gradient.

    On the device if the group is capturable. A factor of the gradient that is on the device comes later.
    """
    if shards.group["capturable"]:
        steps = torch.stack(shards.steps).double()
    else:
        steps = torch.tensor(shards.steps, dtype=torch.float64)
    ones = torch.ones_like(steps)
    columns = [ones * scale(steps) for scale in shards.rule.factors.values()]
    columns += [ones] * (SCALES - len(columns))
    factor = 1.0 if isinstance(shards.grad_factor, Tensor) else shards.grad_factor
    return torch.stack([*columns, ones * shards.group["lr"], ones * factor], 1).float()
