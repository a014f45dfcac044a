"""The layout of an optimizer under DeepSpeed's ZeRO, read from the internals of DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import ShardLayout
from distopt.layout.deepspeed_private import flat_groups, partition_group, position, read, sub_groups
from distopt.layout.flat import FlatLayout, Partition, Piece, own_piece
from distopt.layout.infer import infer_layout
from distopt.layout.places import Segment
from distopt.layout.tensors import trained

_HIDDEN = (
    "DeepSpeed gives the optimizer its gradients for the time of a step only, so there are none to measure or clip "
    "here: set gradient_clipping in DeepSpeed's configuration, and ask engine.get_global_grad_norm() after a step"
)

_KNOWN = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
# This rank's part of a parameter: the parameter, the flat tensor, the first element in it, the weights of the model.
_Part = tuple[Tensor, Tensor, int, Piece]


def deepspeed_layout(engine: Any) -> ShardLayout:
    """Makes the layout of an optimizer that was given to `deepspeed.initialize`, for ZeRO stages 0 to 3.

        optimizer.bind(distopt.layout.deepspeed_layout(engine))

    DeepSpeed flattens the parameters of a group (stages 1, 2) or of a sub-group (3), divides the result into one
    partition for each rank, wherever that cuts a layer, and calls `optimizer.step()` once for each; a call communicates
    if its group has trust ratios. (One exchange for all calls would need the float32 gradients of all sub-groups at
    once, which DeepSpeed makes one after another to save that memory.) The padding of the partitions is in no segment:
    it is uninitialised memory in stage 3. Clipping, loss scaling and accumulation stay DeepSpeed's.

    Stage 3 of DeepSpeed 0.19.8 updates a parameter that a step does not use with its gradient of an earlier step:
    `distopt.engine.DeepSpeed` clears that; whoever calls DeepSpeed directly has to use every parameter in every step.

    Args:
        engine: The engine that `deepspeed.initialize` returned; bind before the first step.

    Raises:
        ValueError: If DeepSpeed updates partitions by another optimizer too (ZenFlow, SuperOffload); if the model is
            sharded in other ways as well (AutoTP, a client's mpu, pipelines, experts); if DeepSpeed's internals are not
            those of version 0.19.8; or if a segment does not have the weights that it should, since a norm would then
            be wrong.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    _refuse_model_parallel(engine)
    if stage == 0:
        layout = infer_layout(trained(p for group in engine.basic_optimizer.param_groups for p in group["params"]))
        return layout if zero is engine.basic_optimizer else replace(layout, gradients_hidden=_HIDDEN)  # masters
    if type(zero).__name__ not in _KNOWN:
        raise ValueError(
            f"DeepSpeed's {type(zero).__name__} may step without the optimizer, as ZenFlow and SuperOffload do: "
            f"leave such options out of zero_optimization, so that it is one of {', '.join(_KNOWN)}"
        )
    partitions, parts, groups = (_stage3 if stage == 3 else _stage12)(zero)
    layers = [p for partition in partitions for p in partition.members]
    segments: dict[Tensor, list[Segment]] = {p.flat: [] for p in partitions}  # none, of a partition that is all padding
    number = {param: i for i, param in enumerate(layers)}
    for param, flat, start, piece in parts:
        _check(flat, start, piece, number[param], param)
        segments[flat].append(Segment(number[param], start, piece.weights.numel(), piece.offset))
    if len({group.group_name for group in groups}) > 1:
        raise ValueError("DeepSpeed partitions the param groups over different ranks (experts): that is not supported")
    return FlatLayout(
        segments={flat: tuple(found) for flat, found in segments.items()},
        params=tuple(layers),
        device=partitions[0].flat.device if partitions else torch.device(engine.device),
        groups=tuple({group.group_name: group for group in groups if dist.get_world_size(group) > 1}.values()),
        wire=torch.device(engine.device),
        partitions=tuple(partitions),
        gradients_hidden=_HIDDEN,
    )


def _refuse_model_parallel(engine: Any) -> None:
    """Refuses an engine that partitions state and exchanges gradients among some ranks only.

    The others may have other shards of the same layers, which no norm would count.
    """
    among, world = dist.get_world_size(read(engine, "seq_data_parallel_group")), dist.get_world_size()
    if among != world:
        raise ValueError(
            f"DeepSpeed partitions the model among {among} of {world} ranks, as with tensor parallelism (AutoTP), a "
            "client's mpu or pipeline stages: norms of layers would leave out the shards of other ranks; train with "
            "data parallelism alone, without tensor_parallel in DeepSpeed's configuration and without an mpu"
        )


_Found = tuple[list[Partition], list[_Part], list[dist.ProcessGroup]]


def _stage12(zero: Any) -> _Found:
    """Reads stages 1 and 2: a parameter is a view of its group's flat buffer, and each rank has an equal part of that.

    Does not read DeepSpeed's own `_hp_mapping`, which is wrong with round_robin_gradients (0.19.8).
    """
    params, flats, buffers, groups = flat_groups(zero)

    def parts() -> Iterator[_Part]:
        for members, flat, buffer, group in zip(params, flats, buffers, groups):
            low = dist.get_rank(group) * flat.numel()
            for p in members:
                if p.data.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                    raise ValueError("a DeepSpeed parameter is no view of its group's flat buffer: unknown layout")
                offset = int(p.data.storage_offset() - buffer.storage_offset())
                start, stop = max(offset, low), min(offset + p.numel(), low + flat.numel())
                if start < stop:
                    weights = p.data.view(-1)[start - offset : stop - offset]
                    yield p, flat, start - low, Piece(weights, start - offset)

    partitions = [Partition(flat, i, tuple(members)) for i, (flat, members) in enumerate(zip(flats, params))]
    return partitions, list(parts()), groups


def _stage3(zero: Any) -> _Found:
    """Reads stage 3: each rank has an equal part of every parameter, the last ones padded, end to end by sub-group."""
    partitions = [Partition(flat, group, tuple(params)) for flat, group, params in sub_groups(zero)]
    members: list[Any] = [p for partition in partitions for p in partition.members]
    parts: list[_Part] = []
    for p in members:
        index, start = position(zero, p)
        piece = own_piece(p)
        if piece.weights.numel():
            parts.append((p, partitions[index].flat, start, piece))
    return partitions, parts, [partition_group(p) for p in members]


def _check(flat: Tensor, start: int, piece: Piece, layer: int, param: Tensor) -> None:
    """Raises ValueError unless the elements of the partition, rounded, are the weights that the model computes with."""
    weights = flat.detach()[start : start + piece.weights.numel()]
    if not torch.equal(weights.to(piece.weights), piece.weights):
        raise ValueError(
            f"DeepSpeed's partition does not hold layer {layer} (shape {tuple(param.shape)}) where it should: "
            "bind before weights change, right after deepspeed.initialize"
        )
