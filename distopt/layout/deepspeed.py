"""DeepSpeed ZeRO: where each layer lies in the flat float32 partitions that DeepSpeed hands to the optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import Segment, ShardLayout, trained
from distopt.layout.infer import infer_layout

if TYPE_CHECKING:
    from typing_extensions import Self


class Piece(NamedTuple):
    """Elements of a parameter that this rank holds as the model computes with them: a flat view, from `offset` on."""

    weights: Tensor
    offset: int


class Partition(NamedTuple):
    """A flat tensor that the optimizer steps, its param group, and the parameters that lie in it over all ranks."""

    flat: Tensor
    group: int
    members: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class FlatLayout(ShardLayout):
    """Layers end to end in flat partitions, one or several for each param group, cut for the ranks anywhere.

    partitions: in the same order on every rank.
    """

    partitions: tuple[Partition, ...] = ()

    def moved(self, copied: Callable[[Tensor], Tensor]) -> Self:
        raise ValueError(
            "the optimizer is bound to DeepSpeed's partitions, which a copy would not be: copy the model, make another "
            "optimizer from the copy and load this one's checkpoint into it (distopt.load_checkpoint)"
        )

    def full_shape(self, param: Tensor) -> torch.Size:
        return whole_shape(param)

    def local_params(self, group: int, params: Iterable[Tensor]) -> list[Tensor]:
        return [partition.flat for partition in self.partitions if partition.group == group]

    def whole(self, param: Tensor, values: Mapping[Tensor, Tensor]) -> Tensor:
        """A whole layer, of what the ranks hold in these tensors, each cut up as the flat one it is given for.

        One all-reduce of the layer's size. Every rank has to call it, for this and for all methods below.
        """
        mine = [(s.offset, values[flat].detach()[s.start : s.start + s.numel]) for flat, s in self._segments[param]]
        return self.add_up(param, values[self._flats[param]].dtype, mine)

    def spread(self, param: Tensor, whole: Tensor, values: Mapping[Tensor, Tensor]) -> None:
        """The reverse: this rank's elements of a whole layer go where they belong in these tensors."""
        for flat, s in self._segments[param]:
            values[flat].data[s.start : s.start + s.numel] = whole.view(-1)[s.offset : s.offset + s.numel]

    def show(self) -> None:
        """Gives the model the weights of the partitions, as DeepSpeed's own step does."""
        for param in self.params:
            self.show_layer(param, self.whole(param, {flat: flat for flat in self.segments}))

    def show_layer(self, param: Tensor, whole: Tensor) -> None:
        """Gives the model the weights of one parameter, frozen or not."""
        for piece in self.pieces(param):
            piece.weights.copy_(whole.view(-1)[piece.offset : piece.offset + piece.weights.numel()])

    def pieces(self, param: Tensor) -> list[Piece]:
        """What this rank holds now of a parameter, frozen or not, as the model computes with it: a part, all, or both.

        Stage 3 gathers parameters for a while, and keeps small ones, so that the answer holds until the model runs.
        """
        whole = [Piece(param.data.view(-1), 0)] if param.data.shape == whole_shape(param) else []
        return ([own_piece(param)] if hasattr(param, "ds_tensor") else []) + whole

    def add_up(self, like: Tensor, dtype: torch.dtype, mine: Iterable[tuple[int, Tensor]]) -> Tensor:
        """A whole tensor of the elements that the ranks hold, each from its offset on."""
        shape = whole_shape(like)
        whole = torch.zeros(shape.numel(), dtype=dtype, device=self.wire)
        for offset, values in mine:
            whole[offset : offset + values.numel()] = values
        for group in self.groups:
            dist.all_reduce(whole, group=group)
        return whole.view(shape)

    @functools.cached_property
    def _flats(self) -> dict[Tensor, Tensor]:
        """The flat tensor in which each layer lies, on this rank or on others."""
        return {p: part.flat for part in self.partitions for p in part.members}

    @functools.cached_property
    def _segments(self) -> dict[Tensor, list[tuple[Tensor, Segment]]]:
        """Where this rank holds elements of each layer."""
        held: dict[Tensor, list[tuple[Tensor, Segment]]] = {p: [] for p in self.params}
        for flat, segments in self.segments.items():
            for segment in segments:
                held[self.params[segment.layer]].append((flat, segment))
        return held


def whole_shape(param: Any) -> torch.Size:
    """The shape of a parameter, which stage 3 leaves empty between its uses."""
    return getattr(param, "ds_shape", param.shape)


_KNOWN = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
# This rank's part of a parameter in a flat partition: the parameter, the flat tensor, from where, the weights.
_Part = tuple[Tensor, Tensor, int, Piece]


def deepspeed_layout(engine: Any) -> ShardLayout:
    """The layout of an optimizer that was given to `deepspeed.initialize`, for `optimizer.bind`; ZeRO stages 0 to 3.

    DeepSpeed flattens the parameters of a group (stages 1, 2) or of a sub-group (3), cuts the result into one
    partition for each rank, wherever that cuts a layer, and calls `optimizer.step()` once for each; a call communicates
    if its group has trust ratios. (One exchange for all calls would need the float32 gradients of all sub-groups at
    once, which DeepSpeed makes one after another to save that memory.) What pads the partitions is in no segment: it is
    uninitialised memory in stage 3. Clipping, loss scaling and accumulation stay DeepSpeed's.

    Stage 3 of DeepSpeed 0.19.8 steps a parameter that a step does not use with its gradient of an earlier step:
    `distopt.engine.DeepSpeed` clears that; who calls DeepSpeed himself uses every parameter in every step.

    engine: what `deepspeed.initialize` returned first; bind before the first step.
    Raises ValueError if DeepSpeed steps partitions by another optimizer too (ZenFlow, SuperOffload), if the model is
    sharded in other ways besides (AutoTP, a client's mpu, pipelines, experts), if its internals are not those of
    version 0.19.8 that this reads, or if a segment does not hold the weights it should: then a norm would be wrong.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    _refuse_model_parallel(engine)
    if stage == 0:
        layout = infer_layout(trained(p for group in engine.basic_optimizer.param_groups for p in group["params"]))
        return replace(layout, gradients_stay=zero is engine.basic_optimizer)  # else these are float32 masters
    if type(zero).__name__ not in _KNOWN:
        raise ValueError(
            f"DeepSpeed's {type(zero).__name__} may step without the optimizer, as ZenFlow and SuperOffload do: "
            f"leave such options out of zero_optimization, so that it is one of {', '.join(_KNOWN)}"
        )
    try:
        read = _stage3 if stage == 3 else _stage12
        partitions, parts, groups = read(zero)
    except AttributeError as error:
        raise ValueError(
            f"DeepSpeed's {type(zero).__name__} has no {error.name!r} any more: distopt reads the layout of its "
            "partitions from there as of DeepSpeed 0.19.8; install that version"
        ) from error
    layers = [p for partition in partitions for p in partition.members]
    segments: dict[Tensor, list[Segment]] = {p.flat: [] for p in partitions}  # one that is all padding holds no layer
    number = {param: i for i, param in enumerate(layers)}
    for param, flat, start, piece in parts:
        _check(flat, start, piece, number[param], param)
        segments[flat].append(Segment(number[param], start, piece.weights.numel(), piece.offset))
    if len({group.group_name for group in groups}) > 1:
        raise ValueError("DeepSpeed partitions the param groups over different ranks (experts): that is not supported")
    return FlatLayout(
        segments={flat: tuple(held) for flat, held in segments.items()},
        params=tuple(layers),
        device=partitions[0].flat.device if partitions else torch.device(engine.device),
        groups=tuple({group.group_name: group for group in groups if dist.get_world_size(group) > 1}.values()),
        wire=torch.device(engine.device),
        partitions=tuple(partitions),
        gradients_stay=False,
    )


def _refuse_model_parallel(engine: Any) -> None:
    """Refuses an engine that partitions state and exchanges gradients among some ranks only: others may hold other
    shards of the same layers, and no norm would count those."""
    among, world = dist.get_world_size(engine.seq_data_parallel_group), dist.get_world_size()
    if among != world:
        raise ValueError(
            f"DeepSpeed partitions the model among {among} of {world} ranks, as with tensor parallelism (AutoTP), a "
            "client's mpu or pipeline stages: norms of layers would leave out what other ranks hold; train with data "
            "parallelism alone, without tensor_parallel in DeepSpeed's configuration and without an mpu"
        )


_Found = tuple[list[Partition], list[_Part], list[dist.ProcessGroup]]


def _stage12(zero: Any) -> _Found:
    """A parameter is a view of its group's flat low-precision buffer, of which each rank has an equal part in order.

    Not by DeepSpeed's own `_hp_mapping`, which is wrong with round_robin_gradients (0.19.8).
    """
    bf16 = hasattr(zero, "fp32_groups_flat_partition")  # BF16_Optimizer: bf16 with gradients accumulated in float32
    params = zero.bf16_groups if bf16 else zero.bit16_groups
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    whole = zero.bf16_groups_flat if bf16 else zero.bit16_groups_flat
    groups = list(zero.real_dp_process_group)

    def parts() -> Iterator[_Part]:
        for members, flat, buffer, group in zip(params, flats, whole, groups):
            low = dist.get_rank(group) * flat.numel()
            for p in members:
                if p.data.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                    raise ValueError("a DeepSpeed parameter is no view of its group's flat buffer: unknown layout")
                offset = p.data.storage_offset() - buffer.storage_offset()
                start, stop = max(offset, low), min(offset + p.numel(), low + flat.numel())
                if start < stop:
                    weights = p.data.view(-1)[start - offset : stop - offset]
                    yield p, flat, start - low, Piece(weights, start - offset)

    partitions = [Partition(flat, i, tuple(members)) for i, (flat, members) in enumerate(zip(flats, params))]
    return partitions, list(parts()), groups


def _stage3(zero: Any) -> _Found:
    """Each rank has an equal part of every parameter, the last ones padded; the parts of a sub-group lie end to end."""
    flats = list(zero.fp32_partitioned_groups_flat)
    partitions = [
        Partition(flat, zero.sub_group_to_group_id[i], tuple(members))
        for i, (flat, members) in enumerate(zip(flats, zero.fp16_groups))
    ]
    members: list[Any] = [p for partition in partitions for p in partition.members]
    parts: list[_Part] = []
    for p in members:
        number, start, _ = zero.grad_position[zero.get_param_id(p)]
        piece = own_piece(p)
        if piece.weights.numel():
            parts.append((p, flats[number], start, piece))
    return partitions, parts, [p.ds_process_group for p in members]


def own_piece(param: Any) -> Piece:
    """This rank's part of a stage-3 parameter, without what pads it."""
    size = param.ds_tensor.numel()
    offset = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
    return Piece(param.ds_tensor.data.view(-1)[: min(size, param.ds_numel - offset)], offset)


def _check(flat: Tensor, start: int, piece: Piece, layer: int, param: Tensor) -> None:
    """What the flat partition holds, rounded, has to be what the model computes with."""
    held = flat.detach()[start : start + piece.weights.numel()]
    if not torch.equal(held.to(piece.weights), piece.weights):
        raise ValueError(
            f"DeepSpeed's partition does not hold layer {layer} (shape {tuple(param.shape)}) where it should: "
            "bind before weights change, right after deepspeed.initialize"
        )
