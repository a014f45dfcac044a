"""What the host does late or by hand, so that it need not wait and the device is not kept waiting."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_COLLECT_EVERY = 50  # steps


class Late:
    """Numbers on their way from the device to the host.

    Args:
        values: The numbers. On a GPU they are copied to pinned memory when the device has computed them.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Returns the numbers; waits only if the device has not got there yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


@contextlib.contextmanager
def garbage_collected_by_hand() -> Iterator[Callable[[int], None]]:
    """Collects garbage at some steps alone, on every rank at the same ones.

    Python's own collector starts whenever enough objects were made, on each rank at another moment, and the other ranks
    wait for it in a collective. What exists already, the model and the libraries, is not looked at again, unless the
    program has frozen objects of its own choice before.

    Yields:
        A function to call with the number of each step.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % _COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield collect
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
