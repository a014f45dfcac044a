"""The weights that an optimizer updates where those of the model have 16 bits: in float32, or rounded at random.

`master_weights`, an option of every param group, says what beside a bfloat16 weight is in the state:

    "float32"      `master`, a float32 copy, which is updated in the weight's place and rounded to it: 4 bytes
    "remainder"    `remainder`, the 16 bits that bfloat16 cuts off: weight and remainder are a float32 number that is
                   updated as a master is, with the same bits: 2 bytes
    "none"         nothing: the updated weight is rounded at random, the same on every layout and number of ranks

Without one of the three, steps below half a unit in the last place of 16 bits would be lost, silently. Parameters of 32
bits and more have no need of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels import rounding
from distopt.kernels.rounding import BESIDE
from distopt.kernels.rules import Slot
from distopt.layout import ShardLayout, fit, local, wide

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer

Group = dict[str, Any]


def beside(param: Tensor, group: Group) -> str:
    """Returns the name of what is in the state of a parameter beside its buffers: of `BESIDE`, or ""."""
    if param.dtype == wide(param.dtype):
        return ""
    return {"float32": "master", "remainder": "remainder", "none": ""}[group["master_weights"]]


def settle_beside(layout: ShardLayout, group: Group, param: Tensor, state: dict[str, Any], of: str) -> None:
    """Makes what a parameter's state has beside its buffers, from another form if it has that, and lays it out.

    Raises:
        ValueError: For one of another shape than its parameter.
    """
    wanted, found = beside(param, group), {}
    for name in BESIDE:
        value = state.get(name)
        if value is not None and param.dtype != wide(param.dtype):
            found[name] = fit(layout, param, value, f"{name} of {of}", _slot(name, param))
    for name in BESIDE:  # after all checks
        state.pop(name, None)
    if wanted == "master":
        state["master"] = found["master"] if "master" in found else layout.master(param)
    elif wanted == "remainder":
        state["remainder"] = found["remainder"] if "remainder" in found else layout.zeros(param, torch.bfloat16)
    if wanted not in found and found and wanted:
        _convert(layout, param, found, state[wanted])


def check_beside(optimizer: ShardedOptimizer, group: Group) -> None:
    """Raises ValueError for a param group whose `master_weights` its rule or its parameters do not have."""
    said = f"master_weights={group['master_weights']!r}"
    if group["master_weights"] == "float32":
        return
    if optimizer.needs_float32:
        raise ValueError(f"{said}: {type(optimizer).__name__} {optimizer.needs_float32}: give 'float32'")
    for option in ("capturable", "cautious"):
        if group[option]:
            raise ValueError(f"{said} with {option}=True, which needs float32 weights: give 'float32', or False")
    for param in group["params"]:
        if param.dtype is torch.float16:
            raise ValueError(
                f"{said}: a parameter has dtype {param.dtype}, which is not the upper half of a float32: give "
                "'float32', or train in bfloat16"
            )


class Masters:
    """Float32 copies of 16-bit weights, which an optimizer updates in their place.

    A weight that is changed from outside (a model's state dict, an average of weights, `torch.nn.init`) replaces its
    master's value. Such a change is noticed by torch's count of in-place operations, so that a write through
    `param.data`, which torch does not count, is not.
    """

    def __init__(self) -> None:
        self._seen: dict[Tensor, Any] = {}

    def refresh(self, layout: ShardLayout, param: Tensor, master: Tensor, always: bool) -> Tensor:
        """Returns the master, after copying the weights that were changed from outside to it.

        Those are the weights to which the master does not round. Elementwise, so that the others keep the bits that 16
        bits lack. Nothing is read back to the host.
        """
        if always or self._seen.get(param) != _version(param):
            for low, high in zip(layout.split(param, param.detach()), layout.split(param, master)):
                high.copy_(torch.where(high.to(low.dtype) == low, high, low.to(high.dtype)))
        return master

    def round(self, layout: ShardLayout, param: Tensor, master: Tensor) -> None:
        """Rounds a master to its parameter, to the nearest."""
        torch._foreach_copy_(layout.split(param, param.detach()), layout.split(param, master))
        self._seen[param] = _version(param)


def _slot(name: str, param: Tensor) -> Slot | None:
    return Slot(tuple(param.shape), dtype=torch.bfloat16) if name == "remainder" else None


@torch.no_grad()
def _convert(layout: ShardLayout, param: Tensor, found: dict[str, Tensor], to: Tensor) -> None:
    """Fills a master from weights and remainder, or a remainder from weights and master."""
    (given,) = found.values()
    for weights, old, new in zip(*(layout.split(param, t) for t in (param.detach(), given, to))):
        new.copy_(rounding.masters_of(weights, old) if "remainder" in found else rounding.remainders_of(weights, old))


def _version(param: Tensor) -> tuple[int, int, int]:
    """Changes with every in-place operation on a parameter, or on a DTensor's local tensor, and with its memory."""
    tensor = local(param)
    return param._version, tensor._version, tensor.data_ptr()
