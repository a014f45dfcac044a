"""The private names of DeepSpeed that distopt reads, as of version 0.19.8; nothing else in distopt uses them.

They are in deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and partition_parameters.py, in runtime/bf16_optimizer.py
and in ops/__init__.py. A name that has moved is a ValueError that says which, and the version that has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

VERSION = "0.19.8"


def read(owner: Any, name: str) -> Any:
    """Returns a private attribute of one of DeepSpeed's objects.

    Raises:
        ValueError: The object does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise ValueError(
            f"DeepSpeed's {type(owner).__name__} has no {name!r} any more: distopt reads it as of DeepSpeed {VERSION}; "
            "install that version"
        ) from error


class FlatGroups(NamedTuple):
    """What stages 1 and 2 keep for each param group.

    Attributes:
        params: The parameters, which are views of `buffers`.
        flats: This rank's float32 partition.
        buffers: All parameters end to end, in the model's dtype.
        process_groups: The ranks among which the buffer is partitioned.
    """

    params: list[list[Tensor]]
    flats: list[Tensor]
    buffers: list[Tensor]
    process_groups: list[dist.ProcessGroup]


def flat_groups(zero: Any) -> FlatGroups:
    """Reads the optimizer wrapper of stages 1 and 2."""
    names = ("bit16_groups", "single_partition_of_fp32_groups", "bit16_groups_flat")
    if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: bf16 with gradients accumulated in float32
        names = ("bf16_groups", "fp32_groups_flat_partition", "bf16_groups_flat")
    params, flats, buffers = (read(zero, name) for name in names)
    return FlatGroups(params, flats, buffers, list(read(zero, "real_dp_process_group")))


class SubGroup(NamedTuple):
    """A sub-group of stage 3: this rank's float32 partition, the index of its param group, and its parameters."""

    flat: Tensor
    group: int
    params: list[Tensor]


def sub_groups(zero: Any) -> list[SubGroup]:
    """Reads the optimizer wrapper of stage 3."""
    group_of = read(zero, "sub_group_to_group_id")
    members = zip(read(zero, "fp32_partitioned_groups_flat"), read(zero, "fp16_groups"))
    return [SubGroup(flat, group_of[i], params) for i, (flat, params) in enumerate(members)]


def position(zero: Any, param: Tensor) -> tuple[int, int]:
    """Returns the index of a stage-3 parameter's sub-group, and its first element in that sub-group's partition."""
    index, start, _ = read(zero, "grad_position")[read(zero, "get_param_id")(param)]
    return index, start


def full_shape(param: Any) -> torch.Size:
    """Returns the full shape of a parameter, which DeepSpeed's stage 3 leaves empty between its uses."""
    # DeepSpeed 0.19.8 zero.Init (runtime/zero/partition_parameters.py) leaves an empty 1-D tensor in each parameter and
    # its shape in ds_shape (DeepSpeed pull request 8438).
    return getattr(param, "ds_shape", param.shape)


def is_partitioned(param: Tensor) -> bool:
    """Returns whether DeepSpeed's stage 3 has sharded a parameter."""
    return hasattr(param, "ds_tensor")


def partition_group(param: Any) -> dist.ProcessGroup:
    """Returns the ranks among which DeepSpeed's stage 3 has sharded a parameter."""
    return read(param, "ds_process_group")


def own_part(param: Any) -> tuple[Tensor, int]:
    """Returns this rank's part of a stage-3 parameter without the padding, 1-D, and its offset in the parameter."""
    shard, numel = read(param, "ds_tensor"), read(param, "ds_numel")
    size = shard.numel()
    offset = min(dist.get_rank(partition_group(param)) * size, numel)
    return shard.data.view(-1)[: min(size, numel - offset)], offset


def global_grad_norm(zero: Any) -> float:
    """Returns the norm of all gradients, which DeepSpeed has computed before it updates the first partition."""
    return float(read(zero, "_global_grad_norm"))


def zero_gradients(zero: Any, stage: int) -> None:
    """Sets the gradients of all partitions to zero, in place.

    DeepSpeed overwrites the gradients of parameters that are used, and takes the old ones of others again (stage 3, and
    offload). With offload it needs the buffers, which the optimizer's own zero_grad would drop.
    """
    if stage == 3:
        read(zero, "grad_partitions_flat_buffer").zero_()
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    for flat in read(zero, name):
        if flat.grad is not None:
            flat.grad.zero_()


def check_overflow_always(zero: Any) -> None:
    """Makes float32 steps look for gradients that are not finite, which stages 1 and 2 do not do by default."""
    if hasattr(zero, "single_partition_of_fp32_groups"):  # stages 1 and 2; the others always look
        read(zero, "check_grad_overflow")
    zero.check_grad_overflow = True


@contextlib.contextmanager
def unclipped(zero: Any) -> Iterator[None]:
    """Turns DeepSpeed's clipping off inside of the block."""
    clip, zero.clip_grad = read(zero, "clip_grad"), 0.0
    try:
        yield
    finally:
        zero.clip_grad = clip


def skip_shared_memory_op(ops: Any) -> None:
    """Keeps DeepSpeed from compiling an op that training never uses: a minute of ninja and g++.

    Args:
        ops: The module `deepspeed.ops`.
    """
    read(ops, "__compatible_ops__")["deepspeed_shm_comm"] = False
