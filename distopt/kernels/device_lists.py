"""A cache of lists of integers on a device, which are copied there without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 64  # lists: with mixtures of experts and layer drop, steps update different parameters


class DeviceLists:
    """A bounded cache of int64 tensors by their values, so that a step with the indices of the last one copies nothing.

    A list that is not in the cache is copied from pinned memory, for which the host does not wait. The list that was
    unused for longest is dropped first.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, integers: tuple[int, ...], device: torch.device) -> Tensor:
        """Returns the integers as a tensor on the device, which must not be written to."""
        if device.type != "cuda":
            stream = 0
        elif torch.cuda.is_current_stream_capturing():  # the memory of a graph belongs to it alone
            return sent(torch.tensor(integers, dtype=torch.int64), device)
        else:  # another stream would not wait for the copy
            stream = torch.cuda.current_stream(device).cuda_stream
        key = integers, device, stream
        tensor = self._kept.pop(key, None)
        if tensor is None:
            tensor = sent(torch.tensor(integers, dtype=torch.int64), device)
        self._kept[key] = tensor  # the newest is the last
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor on the device, without waiting for it.

    It is copied from pinned memory, which torch 2.13 does not reuse in a captured graph.
    """
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
