"""Faults that a single rank can detect: parameters that are not those that the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distopt.layout import local, refuse_foreign


def check_locally(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    """Raises ValueError for parameters whose content is unknown here, and for gradients that were not reduced."""
    check_parameters([param for group in optimizer.param_groups for param in group["params"]])
    if model is not None:
        _check_reduced(model)


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raises ValueError for parameters whose content or sharding this rank cannot determine."""
    refuse_foreign(params)
    for i, param in enumerate(params):
        if local(param).is_meta:
            raise ValueError(
                f"parameter {i} of {len(params)} is on the meta device and has no content: fill the model first"
            )


def _check_reduced(model: nn.Module) -> None:
    """Raises ValueError where FSDP2 keeps gradients that it was told not to reduce, and the optimizer would miss."""
    for name, module in model.named_modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        # Private, as of torch 2.13 (distributed/fsdp/_fully_shard): there is no public access to them.
        for group in module._get_fsdp_state()._fsdp_param_groups:
            waiting = [p for p in group.fsdp_params if _accumulated(p) is not None]
            if waiting or group._partial_reduce_output is not None:
                raise ValueError(
                    f"gradients of {name or type(module).__name__} have not been reduced over the ranks: call "
                    "set_requires_gradient_sync(True) (under HSDP also set_requires_all_reduce(True)) before the last "
                    "backward pass of a step"
                )


def _accumulated(param: Any) -> Tensor | None:
    if param.unsharded_accumulated_grad is not None:
        return param.unsharded_accumulated_grad
    return getattr(getattr(param, "_unsharded_param", None), "grad", None)
