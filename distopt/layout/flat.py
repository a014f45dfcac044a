"""The layout of flat partitions, in which DeepSpeed's ZeRO lays out the float32 parameters of an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.base import ShardLayout
from distopt.layout.deepspeed_private import full_shape, is_partitioned, own_part
from distopt.layout.messages import assemble
from distopt.layout.places import Segment


class Piece(NamedTuple):
    """This rank's elements of a parameter in the dtype that the model computes with.

    Attributes:
        weights: A flat view.
        offset: The first element in the flattened full parameter.
    """

    weights: Tensor
    offset: int


class Partition(NamedTuple):
    """A flat tensor that the optimizer updates.

    Attributes:
        flat: This rank's tensor.
        group: The index of its param group.
        members: The parameters that are laid out in it, over all ranks.
    """

    flat: Tensor
    group: int
    members: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class FlatLayout(ShardLayout):
    """Layers end to end in flat partitions, one or several for each param group, divided among the ranks anywhere.

    Attributes:
        partitions: In the same order on every rank.
    """

    partitions: tuple[Partition, ...] = ()

    @property
    def flat(self) -> bool:
        return True

    @functools.cached_property
    def updated_in(self) -> Mapping[Tensor, Tensor]:
        return {p: part.flat for part in self.partitions for p in part.members}

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for a capturable group, whose partitions share one step count, and for narrow tensors."""
        if group["capturable"]:
            raise ValueError("capturable=True under DeepSpeed, which calls step() once for each partition: give False")
        if group["master_weights"] != "float32":
            raise ValueError(
                f"master_weights={group['master_weights']!r} under DeepSpeed, which keeps float32 masters of its own: "
                "give 'float32', or use zero1 or FSDP2"
            )

        if group["state_bits"] != 32:
            raise ValueError(
                f"state_bits={group['state_bits']} under DeepSpeed, whose partitions end within rows and so within "
                "blocks: give 32, or use zero1 or FSDP2"
            )

    def check_copyable(self) -> None:
        raise ValueError(
            "the optimizer is bound to DeepSpeed's partitions, which a copy would not be: copy the model, make another "
            "optimizer from the copy and load this one's checkpoint into it (distopt.load_checkpoint)"
        )

    def begins_step(self, params: Iterable[Tensor]) -> bool:
        """Whether these are the parameters of the first partition: DeepSpeed calls `step` once for each."""
        return not self.partitions or any(p is self.partitions[0].flat for p in params)

    def local_params(self, group: int, params: Iterable[Tensor]) -> list[Tensor]:
        return [partition.flat for partition in self.partitions if partition.group == group]

    def members(self, params: Iterable[Tensor]) -> list[int]:
        number = {p: i for i, p in enumerate(self.params)}
        flats = set(params)
        return sorted(number[p] for partition in self.partitions if partition.flat in flats for p in partition.members)

    def sharers(self, param: Tensor) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.groups[0])) if self.groups else ()

    def full_shape(self, param: Tensor) -> torch.Size:
        return full_shape(param)

    def state_numel(self, param: Tensor) -> int:
        return param.numel()  # with the padding of the partition

    def gather(self, param: Tensor, values: Mapping[Tensor, Tensor]) -> Tensor:
        """Gathers a full layer. Collective, as all methods below; one all-reduce of the layer's size.

        Args:
            param: The model's parameter.
            values: By flat tensor, a tensor that is laid out as it.
        """
        mine = [(s.offset, values[flat].detach()[s.start : s.start + s.numel]) for flat, s in self._segments[param]]
        return self.add_up(param, values[self.updated_in[param]].dtype, mine)

    def scatter(self, param: Tensor, full: Tensor, values: Mapping[Tensor, Tensor]) -> None:
        """Copies this rank's elements of a full layer into tensors that are laid out as the flat ones."""
        for flat, s in self._segments[param]:
            values[flat].data[s.start : s.start + s.numel] = full.view(-1)[s.offset : s.offset + s.numel]

    def update_model(self) -> None:
        """Copies the weights of the partitions to the model, as DeepSpeed's own step does."""
        for param in self.params:
            self.update_param(param, self.gather(param, {flat: flat for flat in self.segments}))

    def publish(self, params: Sequence[Tensor]) -> None:
        self.update_model()

    def update_param(self, param: Tensor, full: Tensor) -> None:
        """Copies full weights to one parameter of the model, frozen or not."""
        for piece in self.pieces(param):
            piece.weights.copy_(full.view(-1)[piece.offset : piece.offset + piece.weights.numel()])

    def pieces(self, param: Tensor) -> list[Piece]:
        """Returns where this rank has a parameter, frozen or not, as the model computes with it: a part, all, or both.

        Stage 3 gathers parameters for a while, and keeps small ones, so that the answer is valid until the model runs.
        """
        full = [Piece(param.data.view(-1), 0)] if param.data.shape == full_shape(param) else []
        return ([own_piece(param)] if is_partitioned(param) else []) + full

    def add_up(self, like: Tensor, dtype: torch.dtype, mine: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Gathers a full tensor from the elements of the ranks.

        Args:
            like: A parameter of the same full shape.
            dtype: The dtype of the result.
            mine: This rank's elements: the offset and the values of each run.
        """
        shape = full_shape(like)
        full = torch.zeros(shape.numel(), dtype=dtype, device=self.wire)
        for offset, values in mine:
            full[offset : offset + values.numel()] = values
        assemble(full, self.groups)
        return full.view(shape)

    @functools.cached_property
    def _segments(self) -> dict[Tensor, list[tuple[Tensor, Segment]]]:
        """The segments of each layer on this rank."""
        found: dict[Tensor, list[tuple[Tensor, Segment]]] = {p: [] for p in self.params}
        for flat, segments in self.segments.items():
            for segment in segments:
                found[self.params[segment.layer]].append((flat, segment))
        return found


def own_piece(param: Any) -> Piece:
    """Returns this rank's part of a stage-3 parameter, without the padding."""
    return Piece(*own_part(param))
