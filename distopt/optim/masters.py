"""Float32 masters of 16-bit weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distopt.layout import ShardLayout, local


class Masters:
    """Float32 copies of 16-bit weights, which an optimizer steps instead of these.

    Steps below half a unit in the last place of a 16-bit weight would be lost. A weight that has been changed by
    somebody else (a model's state dict, an average of weights, `torch.nn.init`) is its master's new value: seen by
    torch's count of in-place operations, so that what writes through `param.data`, which torch does not count, is not.
    """

    def __init__(self) -> None:
        self._seen: dict[Tensor, Any] = {}

    def refresh(self, layout: ShardLayout, param: Tensor, master: Tensor, always: bool) -> Tensor:
        """The master, whose weights are those of its parameter."""
        if always or self._seen.get(param) != _version(param):
            layout.refresh_master(param, master)
        return master

    def publish(self, layout: ShardLayout, param: Tensor, master: Tensor) -> None:
        """Rounds a master to its parameter."""
        layout.round_master(param, master)
        self._seen[param] = _version(param)


def _version(param: Tensor) -> tuple[int, int, int]:
    """Changes with every in-place operation on a parameter, or on a DTensor's local tensor, and with its memory."""
    tensor = local(param)
    return param._version, tensor._version, tensor.data_ptr()
