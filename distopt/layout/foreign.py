"""Refuses parameters that were sharded or replaced in a way that no placement says: their norms would be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.layout.dtensor import misread_by_torch

_FSDP1 = (
    "belongs to FSDP1 (FullyShardedDataParallel), which keeps its shard in a plain tensor that does not say which part "
    "of which layer it is: shard the model by FSDP2 (torch.distributed.fsdp.fully_shard), and make the optimizer after"
)
_TENSOR_PARALLEL = (
    "is marked as one shard of a tensor-parallel weight, and is a plain tensor that does not say which ranks have the "
    "others: shard it as a DTensor (torch.distributed.tensor.parallel.parallelize_module); if every rank has the full "
    "weight (a tensor-parallel size of 1, as Transformer Engine marks it too), set the mark to False"
)
_EXPERT = (
    "is marked as an expert's, which only some ranks have (expert parallelism), and is a plain tensor that does not "
    "say which: shard the experts as DTensors; if every rank has all of them, set the mark to True"
)
_DEEPSPEED = (
    "is partitioned by DeepSpeed's ZeRO stage 3: call optimizer.bind(distopt.layout.deepspeed_layout(engine)) right "
    "after deepspeed.initialize"
)
_REPLACED = (
    "was replaced in its model by fully_shard, and gets no gradient any more: make the optimizer after fully_shard, "
    "from the parameters that the model has then"
)
_FREED = (
    "has no memory any more: it is the unsharded copy that FSDP2 keeps between a forward and a backward pass; make the "
    "optimizer after fully_shard and before the first forward pass (or call model.reshard() before)"
)
_WRAPPER = (
    "is a {kind}, a tensor whose elements are not in memory of its own (quantized, or of low precision): train the "
    "tensor that it wraps, or leave the conversion out"
)
_MISREAD = (
    "is sharded along one dimension by tensor or expert parallelism and then by FSDP2, with a remainder for which "
    "torch 2.13 writes checkpoints that it cannot read: choose a size that both numbers of ranks divide, or let FSDP2 "
    "shard another dimension (fully_shard(module, shard_placement_fn=lambda param: Shard(1)))"
)

# The attributes by which libraries mark such parameters, the value that marks (None: any), and the message.
_MARKS: dict[str, tuple[bool | None, str]] = {
    "_is_flat_param": (True, _FSDP1),  # torch 2.13, distributed/fsdp/_flat_param.py
    "_fsdp_flattened": (True, _FSDP1),  # the same, with use_orig_params
    "_fsdp_orig_uid": (None, _REPLACED),  # torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py
    "tensor_model_parallel": (True, _TENSOR_PARALLEL),  # Megatron, Transformer Engine, DeepSpeed's AutoTP
    "model_parallel": (True, _TENSOR_PARALLEL),  # Megatron's older mark
    "allreduce": (False, _EXPERT),  # the experts of Megatron and DeepSpeed
    "ds_tensor": (None, _DEEPSPEED),
}
# DTensors say this by their placements, so that a mark adds nothing.
_PLACED = (_TENSOR_PARALLEL, _EXPERT)


def refuse_foreign(params: Iterable[Tensor]) -> None:
    """Refuses parameters in which an optimizer would update, or measure, anything but a known part of a layer.

    Looks at this rank alone and communicates nothing. Most findings are the same on all ranks.

    Args:
        params: The parameters of an optimizer: plain tensors, or DTensors.

    Raises:
        ValueError: If a parameter is a shard of FSDP1, a plain shard of a tensor-parallel or expert-parallel weight, or
        a
            partition of DeepSpeed's stage 3; one that FSDP2 has replaced or freed; or a tensor subclass that wraps
            others.
    """
    params = list(params)
    for i, param in enumerate(params):
        if fault := _fault(param):  # without its shape, which differs between the ranks of FSDP1
            raise ValueError(f"parameter {i} of {len(params)} {fault}")


def refuse_replaced(params: Sequence[Tensor], given: set[int]) -> None:
    """Refuses plain tensors that an engine has put in the place of an optimizer's parameters without a layout.

    Args:
        params: The trainable parameters of the optimizer now.
        given: The ids of those with which it was made.

    Raises:
        ValueError: If there is such a tensor: a norm of it would be silently wrong.
    """
    unknown = [p for p in params if id(p) not in given and not hasattr(p, "placements")]
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters (the first of shape {tuple(unknown[0].shape)}) were replaced by plain "
            "tensors after the optimizer was made: which layers they hold is unknown, so a norm of them would be "
            "silently wrong; call optimizer.bind(layout) with the engine's layout, or in a Trainer mix in "
            "distopt.integrations.transformers.ShardedTrainerMixin (DeepSpeed at stage 0 in 16 "
            "bits steps before it can have one: use stage 1, or DDP)"
        )


def _fault(param: Any) -> str:
    marks = vars(param)
    for name in marks.keys() & _MARKS.keys():
        value, said = _MARKS[name]
        if (value is None or marks[name] is value) and not (said in _PLACED and hasattr(param, "placements")):
            return f"{said} ({name}={marks[name]})" if said in _PLACED else said
    if misread_by_torch(param):
        return _MISREAD
    tensor = param.to_local() if hasattr(param, "to_local") else param
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _is_fake(tensor):
        return _WRAPPER.format(kind=type(tensor).__name__)
    if tensor.numel() and not tensor.is_meta and not tensor.untyped_storage().nbytes():
        return _FREED
    return ""


def _is_fake(tensor: Tensor) -> bool:
    """Returns whether this is one of torch's fake tensors, on which programs are traced."""
    return isinstance(tensor, torch._subclasses.FakeTensor)
