"""The rules in Triton: on a GPU one launch for all tensors of a param group, and nothing that waits for the device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from distopt.layout.device_lists import DeviceLists, sent
from distopt.shards import Shards

DEVICES = ("cuda",)  # torch calls AMD's so too
_GRADS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 16  # bytes: the most that one load takes
_lists = DeviceLists()  # of addresses too, which are integers, so that what is kept is never old


@functools.cache
def kernels() -> Any:
    """The module of the kernels; None where Triton is not installed, or DISTOPT_KERNELS=off."""
    if os.environ.get("DISTOPT_KERNELS") == "off" or importlib.util.find_spec("triton") is None:
        return None
    from distopt.kernels import triton_rules  # here, since Triton takes longer to import than all of distopt

    return triton_rules


class TritonMove:
    """As `Move`, by a rule of triton_rules.py.

    hyper: the rule's hyper-parameters. scales: two columns of what differs between the tensors; on the host, or on the
    device where the group is capturable.
    """

    def __init__(
        self, rule: str, shards: Shards, buffers: list[list[Tensor]], hyper: list[float], scales: list[Tensor]
    ) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._device = shards.params[0].device
        numels = [p.numel() for p in shards.params]
        *firsts, self._pieces = accumulate((-(-numel // kernels().PIECE) for numel in numels), initial=0)
        columns = [[t.data_ptr() for t in tensors] for tensors in (shards.params, shards.grads, *buffers)]
        aligned = all(address % _ALIGNMENT == 0 for column in columns for address in column)
        columns += [[0] * len(numels)] * (5 - len(columns))
        self._table = _lists.get(tuple(chain.from_iterable(zip(*columns, numels, firsts))), self._device)
        scales = [*scales, torch.ones_like(scales[0]) * self.group["lr"]]
        self._scales = sent(torch.stack(scales, 1).float(), self._device)
        if shards.rates is not None:
            self._scales[:, 1] = torch.stack(shards.rates)
        grad = shards.grads[0].dtype
        self._rule = {
            "h": tuple(hyper),
            "RULE": kernels().RULES[rule],
            "BUFFERS": len(buffers),
            "GRAD": getattr(kernels().tl, _GRADS[grad]),
            "ALIGNMENT": _ALIGNMENT if aligned else grad.itemsize,
        }

    def step(self) -> None:
        self._launch(kernels().STEP, self._scales)

    def squares(self) -> tuple[Tensor, Tensor]:
        pieces = torch.empty(self._pieces, 2, dtype=torch.float32, device=self._device)
        self._launch(kernels().MEASURE, self._scales, pieces)
        totals = torch.empty(len(self.layers), 2, dtype=torch.float64, device=self._device)
        self._add_up(pieces, totals)
        return totals[:, 0], totals[:, 1]

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
            kernels().add_up[(len(self.layers),)](
                self._table, pieces, totals, SIZE=kernels().PIECE, BLOCK=2048, num_warps=8, enable_fp_fusion=True
            )


def triton_moves(name: str, shards: Shards) -> tuple[list[TritonMove], list[int]]:
    """The moves of a rule, by its name, on those shards that the kernels are for, and the numbers of the others.

    They are for float32 weights and state, flat in a GPU's memory; gradients may have 16 bits.
    """
    kinds = _kinds(shards)
    left = kinds.pop(None, [])
    if kinds and kernels() is None:
        return [], list(range(len(shards.params)))
    alike = [shards if len(numbers) == len(shards.params) else shards.part(numbers) for numbers in kinds.values()]
    return [_RULES[name](part) for part in alike], left


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
    row = (param, grad, *buffers)
    if param.device.type not in DEVICES or grad.dtype not in _GRADS:
        return None
    if not all(t.is_contiguous() and (t is grad or t.dtype is torch.float32) for t in row):
        return None
    return param.device, grad.dtype, all(t.data_ptr() % _ALIGNMENT == 0 for t in row)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _steps(shards: Shards) -> Tensor:
    """How many steps each tensor has taken; on the host, or on the device where the group is capturable."""
    if shards.group["capturable"]:
        return torch.stack(shards.steps).double()
    return torch.tensor(shards.steps, dtype=torch.float64)


def _sgd(shards: Shards) -> TritonMove:
    group, steps = shards.group, _steps(shards)
    if not group["momentum"]:
        return TritonMove("sgd", shards, [], [group["weight_decay"]], [torch.ones_like(steps)] * 2)
    share = torch.where(steps == 1.0, 1.0, 1.0 - group["dampening"])
    hyper = [group["weight_decay"], group["momentum"]]
    rule = "nesterov" if group["nesterov"] else "momentum"
    return TritonMove(rule, shards, [shards.buffers["momentum_buffer"]], hyper, [share, torch.ones_like(steps)])


def _adagrad(shards: Shards) -> TritonMove:
    group, steps = shards.group, _steps(shards)
    scale = 1.0 / (1.0 + (steps - 1.0) * group["lr_decay"])
    return TritonMove("adagrad", shards, [shards.buffers["sum"]], [group["weight_decay"], group["eps"]], [scale] * 2)


def _rmsprop(shards: Shards) -> TritonMove:
    group = shards.group
    rule = "_".join(["rmsprop"] + ["centered"] * group["centered"] + ["momentum"] * bool(group["momentum"]))
    hyper = [group["weight_decay"], group["alpha"], 1.0 - group["alpha"], group["eps"], group["momentum"]]
    return TritonMove(rule, shards, list(shards.buffers.values()), hyper, [_steps(shards)] * 2)


def _adam(shards: Shards, coupled: float, decoupled: float) -> TritonMove:
    group, steps = shards.group, _steps(shards)
    beta1, beta2 = group["betas"]
    scales = [1.0 / (1.0 - beta1**steps), (1.0 - beta2**steps) ** -0.5]
    hyper = [coupled, 1.0 - beta1, beta2, 1.0 - beta2, group["eps"], decoupled]
    return TritonMove("adam", shards, [shards.buffers["exp_avg"], shards.buffers["exp_avg_sq"]], hyper, scales)


_RULES: dict[str, Callable[[Shards], TritonMove]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": lambda shards: _adam(shards, shards.group["weight_decay"], 0.0),
    "adamw": lambda shards: _adam(shards, 0.0, shards.group["weight_decay"]),
}
