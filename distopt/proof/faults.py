"""What one rank can see by itself that makes its parameters others than those that the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distopt.layout import local, refuse_foreign


def check_locally(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    """Raises ValueError for parameters of whose content this rank cannot speak, and for gradients that wait."""
    check_parameters([param for group in optimizer.param_groups for param in group["params"]])
    if model is not None:
        _check_reduced(model)


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raises ValueError for parameters whose content, or place in a layer, this rank cannot tell."""
    refuse_foreign(params)
    for i, param in enumerate(params):
        if local(param).is_meta:
            raise ValueError(
                f"parameter {i} of {len(params)} is on the meta device and has no content: fill the model first"
            )


def _check_reduced(model: nn.Module) -> None:
    """FSDP2 keeps gradients that it was told not to reduce: what the optimizer steps by is then something else."""
    for name, module in model.named_modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        # Private, as of torch 2.13 (distributed/fsdp/_fully_shard): nothing public tells of them.
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
