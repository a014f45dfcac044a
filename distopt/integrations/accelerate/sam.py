"""Gives SAM the facts of an Accelerate script that parameters do not show: buffers and mixed precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from distopt.layout import unwrap_optimizer
from distopt.sam import SAM

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach_sam(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    """Sets a SAM's model, whose buffers its second pass must not change, and the dtype that the model computes in.

    Does nothing without a SAM, and keeps values that were set before.

    Raises:
        ValueError: There is a loss scale (fp16) that the SAM's direction would depend on.
    """
    sam = sam_of(optimizer)
    if sam is None:
        return
    if accelerator.scaler is not None and sam.mixes_gradients_of_steps:
        raise ValueError(
            f"{type(sam).__name__} remembers gradients of earlier steps, and fp16's loss scale, which is in them, "
            "changes: use mixed_precision=bf16 (bf16=True in TrainingArguments), or another member of SAM's family"
        )
    if sam.model is None:
        sam.model = model
    if sam.compute_dtype is None:
        sam.compute_dtype = compute_dtype(accelerator)


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Returns the dtype to which Accelerate casts weights in each pass; None if it does not."""
    policy = getattr(accelerator.state.fsdp_plugin, "mixed_precision_policy", None) if accelerator.is_fsdp2 else None
    if policy is not None:
        dtype: torch.dtype | None = policy.param_dtype
        return dtype
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def sam_of(optimizer: Optimizer) -> SAM | None:
    """Returns the SAM that is the optimizer or is inside Accelerate's wrapper; None if there is none."""
    inner = unwrap_optimizer(optimizer, lambda inner: isinstance(inner, SAM))
    return inner if isinstance(inner, SAM) else None
