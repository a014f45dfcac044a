"""Parameters that were sharded or replaced in a way that no placement tells: refused, lest their norms be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FSDP1 = (
    "belongs to FSDP1 (FullyShardedDataParallel), which keeps its shard in a plain tensor that does not say which part "
    "of which layer it is: shard the model by FSDP2 (torch.distributed.fsdp.fully_shard), and make the optimizer after"
)
_TENSOR_PARALLEL = (
    "is marked as one shard of a tensor-parallel weight, and is a plain tensor that does not say which ranks hold the "
    "others: shard it as a DTensor (torch.distributed.tensor.parallel.parallelize_module); if every rank has the full "
    "weight (a tensor-parallel size of 1, as Transformer Engine marks it too), set the mark to False"
)
_EXPERT = (
    "is marked as an expert's, which only some ranks hold (expert parallelism), and is a plain tensor that does not "
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

# The attributes by which libraries mark such parameters, the value that says so (None: any), and what is said of it.
_MARKS: dict[str, tuple[bool | None, str]] = {
    "_is_flat_param": (True, _FSDP1),  # torch 2.13, distributed/fsdp/_flat_param.py
    "_fsdp_flattened": (True, _FSDP1),  # the same, with use_orig_params
    "_fsdp_orig_uid": (None, _REPLACED),  # torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py
    "tensor_model_parallel": (True, _TENSOR_PARALLEL),  # Megatron, Transformer Engine, DeepSpeed's AutoTP
    "model_parallel": (True, _TENSOR_PARALLEL),  # Megatron's older mark
    "allreduce": (False, _EXPERT),  # the experts of Megatron and DeepSpeed
    "ds_tensor": (None, _DEEPSPEED),
}
# What DTensors say by their placements, so that a mark adds nothing.
_PLACED = (_TENSOR_PARALLEL, _EXPERT)


def refuse_foreign(params: Iterable[Tensor]) -> None:
    """Refuses parameters of which an optimizer would step, or measure, something else than a known part of a layer.

    Looks at this rank alone and communicates nothing. Most of what it finds is alike on all ranks.

    Args:
        params: Parameters as an optimizer has them: plain tensors, or DTensors.

    Raises:
        ValueError: A parameter is a shard of FSDP1, a plain shard of a tensor-parallel or expert-parallel weight, or a
            partition of DeepSpeed's stage 3; one that FSDP2 has replaced or freed; or a tensor subclass that wraps
            others.
    """
    params = list(params)
    for i, param in enumerate(params):
        if said := _what_is_wrong(param):  # without its shape, which FSDP1 has different on every rank
            raise ValueError(f"parameter {i} of {len(params)} {said}")


def _what_is_wrong(param: Any) -> str:
    marks = vars(param)
    for name in marks.keys() & _MARKS.keys():
        value, said = _MARKS[name]
        if (value is None or marks[name] is value) and not (said in _PLACED and hasattr(param, "placements")):
            return f"{said} ({name}={marks[name]})" if said in _PLACED else said
    tensor = param.to_local() if hasattr(param, "to_local") else param
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _is_fake(tensor):
        return _WRAPPER.format(kind=type(tensor).__name__)
    if tensor.numel() and not tensor.is_meta and not tensor.untyped_storage().nbytes():
        return _FREED
    return ""


def _is_fake(tensor: Tensor) -> bool:
    """Whether this is one of torch's own tensors without elements, on which programs are tried out."""
    return isinstance(tensor, torch._subclasses.FakeTensor)
