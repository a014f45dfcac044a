"""What one rank can see by itself that makes its parameters others than those that the model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distopt.layout import local


def check_locally(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    """Raises ValueError for parameters of whose content this rank cannot speak, and for gradients that wait."""
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        check_parameter(param)
    if model is not None:
        _check_reduced(model)


def check_parameter(param: Any) -> None:
    """Raises ValueError for a parameter whose content, or place in a layer, this rank cannot tell."""
    tensor, shape = local(param), tuple(param.shape)
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"a parameter of shape {shape} is FSDP1's, whose local part is a plain tensor that says nothing of the "
            "others: shard the model by FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if getattr(param, "tensor_model_parallel", False) and not hasattr(param, "placements"):
        raise ValueError(
            f"a parameter of shape {shape} is marked tensor_model_parallel and is a plain tensor, whose other parts "
            "are where no layout says: use DTensors (torch.distributed.tensor.parallel)"
        )
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(
            f"a parameter of shape {shape} is a {type(tensor).__name__}, whose elements are not in its own memory: "
            "train the tensors that it wraps, or plain ones"
        )
    if tensor.is_meta:
        raise ValueError(f"a parameter of shape {shape} is on the meta device and has no content: fill the model first")
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise ValueError(
            f"the memory of a parameter of shape {shape} has been freed: it is an unsharded copy that FSDP2 had "
            "gathered, or the original that it sharded; make the optimizer after fully_shard, and before a forward pass"
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
