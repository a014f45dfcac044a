"""The layout of a sharded model: everything that an optimizer has to know of an engine, as data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.kernels.device_lists import DeviceLists
from distopt.kernels.shards import row_of
from distopt.layout.dtensor import own_indices
from distopt.layout.norms import LayerNorms
from distopt.layout.param_sync import ParamSync
from distopt.layout.places import Box, Place, Run, Segment, cuts_blocks
from distopt.layout.tensors import Alike, local, local_parts, placements_of, same, trained, wide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

Placement = tuple["DeviceMesh", tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class ShardLayout(LayerNorms):
    """Which part of which layer each of this rank's tensors has, and which ranks have the rest.

    A *layer*, in the sense of the LAMB paper, is one parameter tensor of the model; its norm is that of the full
    tensor.

    Attributes:
        segments: For each tensor that the optimizer updates, the parts of layers in it, in the order of its elements.
        params: The model's parameter of each layer, in the same order on every rank.
        device: The device on which norms are computed; given, because a rank may have no elements.
        groups: The process groups of the mesh axes that shard, the same sequence on every rank; a single group where
            these are not axes of one mesh.
        counted: For each layer, whether this rank contributes it to a norm. Of ranks with equal copies of a shard (a
            layer replicated where others are sharded) only one does, so a sum over all groups counts each element once.
        model: The layout of the model's own weights, where that is not the layout of the optimizer's tensors.
        gradients: The layout of the gradients once they are exchanged, where that is not the layout of the optimizer's
            tensors. Clipping and SAM, which work on those, use it.
        wire: The device that the groups communicate from, where it is not `device` (shards offloaded to the host).
        gradients_hidden: Why gradients cannot be read after a backward pass, and what to do instead; "" if they can.
        copies: The ranks with equal copies of all parameters, where it is known. Plain parameters alone do not say so:
            those that FSDP2 ignores may differ between ranks.
        sync: Brings updated parameters to the ranks that have copies of them; neutral but under ZeRO-1.
    """

    segments: Mapping[Tensor, tuple[Segment, ...]]
    params: tuple[Tensor, ...]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()
    counted: tuple[bool, ...] = ()
    model: ShardLayout | None = None
    gradients: ShardLayout | None = None
    wire: torch.device | None = None
    gradients_hidden: str = ""
    copies: dist.ProcessGroup | None = None
    sync: ParamSync = ParamSync()  # noqa: RUF009  (has no state)
    _indices: DeviceLists = field(default_factory=DeviceLists, init=False, repr=False)
    _alike: Alike = field(default_factory=Alike, init=False, repr=False)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self.segments

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that train this model together, where the layout says that these are not all."""
        return None

    @property
    def gradients_visible(self) -> bool:
        """Whether gradients can be read after a backward pass."""
        return not self.gradients_hidden

    @property
    def flat(self) -> bool:
        """Whether layers are laid out end to end in flat partitions, each updated by a call of `step` of its own."""
        return False

    @property
    def updated_in(self) -> Mapping[Tensor, Tensor]:
        """For each parameter of the model the tensor in which it is updated, on this rank or on others."""
        return {p: p for p in self.params}

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for an option of a param group that cannot be had on this layout."""

    def cuts(self, param: Tensor, block: int) -> bool:
        """Whether some rank's elements of a parameter are not whole blocks of consecutive ones; the same on each."""
        return cuts_blocks(param, self.full_shape(param), block)

    def check_copyable(self) -> None:
        """Raises ValueError if a copy of an optimizer could not have this layout."""

    def begins_step(self, params: Iterable[Tensor]) -> bool:
        """Whether a call of `step` with these parameters is the first one of a training step."""
        return True

    def local_params(self, group: int, params: Iterable[Tensor]) -> list[Tensor]:
        """Returns the tensors that an optimizer updates for a param group.

        Args:
            group: The index of the param group.
            params: The parameters that the group lists.
        """
        return trained(params)

    def full_shape(self, param: Tensor) -> torch.Size:
        """Returns the shape of a full layer, given the model's parameter."""
        return param.shape

    def state_numel(self, param: Tensor) -> int:
        """Returns the elements of a state buffer of a tensor that the optimizer updates, on this rank."""
        return sum(segment.numel for segment in self.segments[param])

    def layers(self, params: Iterable[Tensor]) -> list[int]:
        """Returns the index of the layer of each shard that `split` gives for these parameters, in the same order."""
        params = list(params)
        if same(params, list(self.segments)):  # all of them: nothing to look up
            return [segment.layer for parts in self.segments.values() for segment in parts]
        return [segment.layer for p in params for segment in self.segments[p]]

    def members(self, params: Iterable[Tensor]) -> list[int]:
        """Returns the layers of which these tensors have parts, on this rank or on others; the same on every rank."""
        return sorted(set(self.layers(params)))

    def sharers(self, param: Tensor) -> tuple[int, ...]:
        """Returns the ranks that share a parameter of the model, by shards or equal copies; () for this one alone."""
        if self.copies is not None:
            return tuple(dist.get_process_group_ranks(self.copies))
        mesh = getattr(param, "device_mesh", None)
        return () if mesh is None else tuple(mesh.mesh.flatten().tolist())

    def rows(self, layers: Sequence[int]) -> list[int]:
        return [self._rows[layer] for layer in layers]

    def split(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """Returns local views of a tensor, one for each layer that `param` has a part of.

        Args:
            param: A tensor of `segments`.
            tensor: The parameter itself, its gradient or its state.

        Raises:
            ValueError: If `tensor` is sharded differently from its parameter.
        """
        if getattr(tensor, "placements", None) != getattr(param, "placements", None):
            raise ValueError(
                f"a tensor with placements {getattr(tensor, 'placements', 'none (plain)')} belongs to a parameter with "
                f"{getattr(param, 'placements', 'none (plain)')}: redistribute it before the optimizer sees it"
            )
        return self.split_local(param, local(tensor))

    def split_local(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """As `split`, of a tensor that is local already."""
        segments = self.segments[param]
        if len(segments) == 1 and segments[0].numel == tensor.numel():
            return [tensor]
        flat = tensor.view(-1)
        return [flat.narrow(0, segment.start, segment.numel) for segment in segments]

    def places(self, param: Tensor) -> list[Place]:
        """Returns which elements of its full layer each shard has that `split` gives for this tensor."""
        if hasattr(param, "placements"):
            return [Box(own_indices(param))]
        return [Run(segment.offset, segment.numel) for segment in self.segments[param]]

    def shards(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns local views of tensors that are laid out as these parameters, one for each layer that each has."""
        if self._one_each and not torch.is_grad_enabled() and self._alike(params, tensors):
            return local_parts(tensors)
        return [shard for p, tensor in zip(params, tensors) for shard in self.split(p, tensor)]

    def weights(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Returns local views of the parameters, one for each layer that each has."""
        with torch.no_grad():
            return [shard.detach() for shard in self.shards(params, params)]

    def grads(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Returns local views of the gradients of these parameters, which must have one, in the order of `weights`.

        A gradient that is a DTensor of partial sums, as sequence parallelism leaves it for the weights of norms, is
        reduced first and replaced: then every rank has to call it.

        Raises:
            ValueError: For a sparse gradient.
        """
        return self.grad_shards(params, [p.grad for p in params])  # type: ignore[misc]

    def grad_shards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """As `grads`, of gradients of these parameters that were read before."""
        parts = local_parts(grads)
        if {t.layout for t in parts} - {torch.strided}:
            raise ValueError("sparse gradients have no sharded update: use nn.Embedding(sparse=False)")
        if self._one_each and not torch.is_grad_enabled() and self._alike(params, grads):
            return parts
        for i, (p, placements) in enumerate(zip(params, placements_of(grads))):
            if any(placement.is_partial() for placement in placements or ()):
                p.grad = grads[i] = grads[i].redistribute(placements=p.placements)  # type: ignore[attr-defined]
        return self.shards(params, grads)

    def placement(self, param: Tensor, per: int = 1) -> Placement | None:
        """Returns mesh and placements of state with an element for `per` of a parameter; None: it is a plain tensor."""
        if not hasattr(param, "placements"):
            return None
        return param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]

    def state_device(self, param: Tensor) -> torch.device:
        """Returns the device on which a tensor is updated and its state is kept."""
        return param.device

    def zeros(self, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a new state buffer of zeros, sharded as this rank updates the parameter; None: float32 or wider."""
        return torch.zeros_like(param, dtype=dtype or wide(param.dtype), requires_grad=False)

    def master(self, param: Tensor) -> Tensor:
        """Returns a float32 copy of a 16-bit parameter, updated in its place and sharded as its state."""
        return param.detach().to(wide(param.dtype), copy=True)

    def publish(self, params: Sequence[Tensor]) -> None:
        """Brings parameters that this rank has changed to the model, on all ranks. Collective."""
        self.sync.publish(params)

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same layout for copies of its parameters, which `copy` gives."""
        self.check_copyable()
        return replace(
            self,
            segments={copy(p): segments for p, segments in self.segments.items()},
            params=tuple(copy(p) for p in self.params),
            model=self.model and self.model.copied(copy),
            gradients=self.gradients and self.gradients.copied(copy),
        )

    @functools.cached_property
    def _one_each(self) -> bool:
        """Whether every local tensor is the local part of one layer, and nothing else."""
        if (type(self).split, type(self).split_local) != (ShardLayout.split, ShardLayout.split_local):
            return False
        return all(len(parts) == 1 and parts[0].numel == local(p).numel() for p, parts in self.segments.items())

    @functools.cached_property
    def _rows(self) -> tuple[int, ...]:
        return tuple(row_of(self.full_shape(p)) for p in self.params)
