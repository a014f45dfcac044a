"""What SAM has to know of the script that it runs in, and cannot see from parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from distopt.sam import SAM

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach_sam(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    """Tells a SAM, where there is one around the optimizer, whose buffers its second pass must not move.

    What it was told when it was made stays.
    """
    sam = sam_of(optimizer)
    if sam is None:
        return
    if sam.model is None:
        sam.model = model


def sam_of(optimizer: Optimizer) -> SAM | None:
    """The SAM inside Accelerate's wrapper, or the optimizer itself."""
    inner: object = optimizer
    while not isinstance(inner, SAM) and isinstance(inner, Optimizer):
        inner = getattr(inner, "optimizer", None)
    return inner if isinstance(inner, SAM) else None
