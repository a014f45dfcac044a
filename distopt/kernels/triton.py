"""The rules in Triton: on a GPU one launch for all tensors of a param group, and nothing that waits for the device."""

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
from distopt.kernels.device_lists import DeviceLists, sent
from distopt.kernels.rules import SCALES, Rule, rule
from distopt.kernels.shards import PLAIN, Shards

DEVICES = ("cuda",)  # torch calls AMD's so too
_GRADS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 16  # bytes: the most that one load takes
_GROUPS = 16, 256  # the fewest and the most elements that are summed in float32
_lists = DeviceLists()  # of addresses too, which are integers, so that what is kept is never old


@functools.cache
def kernels() -> Any:
    """The module of the kernels; None where Triton is not installed, or DISTOPT_KERNELS=off."""
    if os.environ.get("DISTOPT_KERNELS") == "off" or importlib.util.find_spec("triton") is None:
        return None
    from distopt.kernels import triton_kernels  # here, since Triton takes longer to import than all of distopt

    return triton_kernels


class TritonUpdate:
    """As `ForeachUpdate`, by a rule of triton_kernels.py.

    Sums are the same bits however layers are sharded by rows, if these are multiples of 16 elements; others may differ.
    """

    def __init__(self, rule: Rule, shards: Shards) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._device = shards.params[0].device
        numels = [p.numel() for p in shards.params]
        *firsts, self._pieces = accumulate((-(-numel // kernels().PIECE) for numel in numels), initial=0)
        buffers = [shards.buffers[name] for name in rule.buffers]
        columns = [[t.data_ptr() for t in tensors] for tensors in (shards.params, shards.grads, *buffers)]
        aligned = all(address % _ALIGNMENT == 0 for column in columns for address in column)
        columns += [[0] * len(numels)] * (5 - len(columns))
        self._table = _lists.get(tuple(chain.from_iterable(zip(*columns, numels, firsts))), self._device)
        self._scales = sent(_scales(rule, shards), self._device)
        if shards.rates is not None:
            self._scales[:, list(rule.scales).index("rate")] = torch.stack(shards.rates)
        grad = shards.grads[0].dtype
        fewest, most = _GROUPS
        self._sum = max(fewest, math.gcd(most, *shards.rows))
        self._rule = {
            "h": tuple(rule.scalars.values()),
            "RULE": kernels().RULES[rule.name],
            "BUFFERS": len(buffers),
            "GRAD": getattr(kernels().tl, _GRADS[grad]),
            "ALIGNMENT": _ALIGNMENT if aligned else grad.itemsize,
            "GROUP": self._sum,
        }

    def step(self) -> None:
        self._launch(kernels().STEP, self._scales)

    def squares(self) -> tuple[Tensor, Tensor]:
        pieces = torch.empty(self._pieces, 2, exact.DIGITS, dtype=torch.float64, device=self._device)
        self._launch(kernels().MEASURE, self._scales, pieces)
        totals = torch.empty(len(self.layers), 2, 2, exact.DIGITS, dtype=torch.float64, device=self._device)
        self._add_up(pieces, totals)
        digits, more = totals.unbind(2)
        digits[..., 1:] += more[..., :-1]
        digits = exact.carried(digits)
        return digits[:, 0], digits[:, 1]

    def apply(self, factors: Tensor) -> None:
        """factors: by layer, on the device."""
        scales = self._scales.clone()
        scales[:, 2] *= factors[_lists.get(tuple(self.layers), self._device)]
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


def triton_updates(name: str, shards: Shards) -> tuple[list[TritonUpdate], list[int]]:
    """The moves of a rule, by its name, on those shards that the kernels are for, and the indices of the others.

    They are for plain tensors of float32 weights and state, flat in a GPU's memory; gradients may have 16 bits.
    """
    kinds = _kinds(shards)
    left = kinds.pop(None, [])
    if kinds and kernels() is None:
        return [], list(range(len(shards.params)))
    alike = [shards if len(numbers) == len(shards.params) else shards.part(numbers) for numbers in kinds.values()]
    return [TritonUpdate(rule(name, part.group), part) for part in alike], left


def unfit(shards: Shards) -> list[int]:
    """The numbers of the shards that the kernels are not for; all of them where there are no kernels."""
    left = _kinds(shards).get(None, [])
    return left if kernels() is not None else list(range(len(shards.params)))


def _kinds(shards: Shards) -> dict[Any, list[int]]:
    """The numbers of the shards by what they have in common; None for what is not for the kernels."""
    kinds: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(shards.params, shards.grads, *shards.buffers.values())):
        kinds.setdefault(_kind(*row), []).append(i)
    return kinds


def _kind(param: Tensor, grad: Tensor, *buffers: Tensor) -> Any:
    """What tensors of one launch have in common; None for what is not for the kernels."""
    tensors = (param, grad, *buffers)
    if param.device.type not in DEVICES or grad.dtype not in _GRADS:
        return None
    if not all(t.is_contiguous() and (t is grad or t.dtype is torch.float32) for t in tensors):
        return None
    if not all(type(t) in PLAIN for t in tensors):  # a wrapper subclass has no memory, or another's
        return None
    return param.device, grad.dtype, all(t.data_ptr() % _ALIGNMENT == 0 for t in tensors)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scales(rule: Rule, shards: Shards) -> Tensor:
    """A row for each tensor: the rule's scales, and lr. On the host, or on the device where the group is capturable."""
    if shards.group["capturable"]:
        steps = torch.stack(shards.steps).double()
    else:
        steps = torch.tensor(shards.steps, dtype=torch.float64)
    ones = torch.ones_like(steps)
    columns = [ones * scale(steps) for scale in rule.scales.values()]
    columns += [ones] * (SCALES - len(columns))
    return torch.stack([*columns, ones * shards.group["lr"]], 1).float()
