"""Lists of integers on a device, made without waiting for it, of which the last few are kept."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 64  # lists: what is stepped differs between steps in mixtures of experts and layer drop


class DeviceLists:
    """The int64 tensors of lists of integers, so that a step that asks for the list of the step before copies nothing.

    A list that is not kept is copied from pinned memory, which the host does not wait for. The oldest list goes first,
    so that the memory is bounded however many lists are asked for.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, integers: tuple[int, ...], device: torch.device) -> Tensor:
        """The integers as a tensor on the device, not to be written to."""
        if device.type != "cuda":
            stream = 0
        elif torch.cuda.is_current_stream_capturing():  # what a graph makes belongs to it alone
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
    """A host tensor on the device, without waiting for it.

    From pinned memory, which torch 2.13 does not use again in a captured graph.
    """
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
