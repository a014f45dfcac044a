"""Where each layer lives: the only thing an engine has to tell an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.kernels import exact
from distopt.kernels.device_lists import DeviceLists
from distopt.kernels.norms import products, squared_norms
from distopt.kernels.shards import PLAIN, row_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


@dataclass(frozen=True)
class Segment:
    """`numel` elements of layer number `layer`, from `start` in the flattened local tensor.

    offset: where they begin in the flattened whole layer; 0 for DTensors, whose placements say that.
    """

    layer: int
    start: int
    numel: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """Which part of which layer this rank holds, for every tensor that an optimizer steps.

    segments: for each tensor the layers that it holds a part of, in the order of its flattened local elements.
    params: the model's parameter of each layer, in the same order on every rank.
    device: where norms are computed; known here because a rank may hold nothing.
    groups: the process groups of the mesh axes that shard, the same sequence on every rank.
    counted: for each layer, whether this rank contributes it to a norm. Of ranks that hold equal copies of a shard (a
        layer replicated along an axis that cuts others) only one does, so a sum over all axes counts each element once.
    model: how the model's own weights lie, where that is not how the optimizer steps them.
    gradients: how gradients lie once they are exchanged, where that is not how the optimizer steps them. Clipping and
        SAM, which work on those, ask it.
    wire: the device that the groups communicate from, where it is not `device` (shards offloaded to the host).
    gradients_stay: whether gradients can be read after a backward pass. DeepSpeed gives them to the optimizer for the
        time of a call of `step`, of which it may make several, each with a part of the parameters.
    """

    segments: Mapping[Tensor, tuple[Segment, ...]]
    params: tuple[Tensor, ...]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()
    counted: tuple[bool, ...] = ()
    model: ShardLayout | None = None
    gradients: ShardLayout | None = None
    wire: torch.device | None = None
    gradients_stay: bool = True
    _indices: DeviceLists = field(default_factory=DeviceLists, init=False, repr=False)

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that train this model together, where the layout says that these are not all."""
        return None

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self.segments

    @functools.cached_property
    def _whole(self) -> bool:
        """Whether every rank holds every layer whole, each in a plain tensor of its own."""
        alone = [held[0].numel == p.numel() if len(held) == 1 else False for p, held in self.segments.items()]
        return not self.groups and all(alone) and all(type(p) in PLAIN for p in self.segments)

    @property
    def num_layers(self) -> int:
        """How many layers there are over all ranks."""
        return len(self.params)

    def local_params(self, group: int, params: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that an optimizer steps for its param group of that number, given the params it lists there."""
        return trained(params)

    def layers(self, owners: Iterable[Tensor]) -> list[int]:
        """The layer of each shard that `split` gives for these owners, in the same order."""
        return [segment.layer for owner in owners for segment in self.segments[owner]]

    def full_shape(self, param: Tensor) -> torch.Size:
        """The shape of a layer, given the model's parameter."""
        return param.shape

    @functools.cached_property
    def _rows(self) -> tuple[int, ...]:
        return tuple(row_of(self.full_shape(p)) for p in self.params)

    def rows(self, layers: Sequence[int]) -> list[int]:
        """The elements of a row of each of these layers: of one index of its dimension 0."""
        return [self._rows[layer] for layer in layers]

    def split(self, owner: Tensor, tensor: Tensor) -> list[Tensor]:
        """Local views of `tensor` (the owner itself, its gradient or state), one for each layer that `owner` holds.

        Raises ValueError if `tensor` is cut up differently from its owner.
        """
        if getattr(tensor, "placements", None) != getattr(owner, "placements", None):
            raise ValueError(
                f"a tensor with placements {getattr(tensor, 'placements', 'none (plain)')} belongs to a parameter with "
                f"{getattr(owner, 'placements', 'none (plain)')}: redistribute it before the optimizer sees it"
            )
        whole = local(tensor)
        segments = self.segments[owner]
        if len(segments) == 1 and segments[0].numel == whole.numel():
            return [whole]
        flat = whole.view(-1)
        return [flat.narrow(0, segment.start, segment.numel) for segment in segments]

    def weights(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """Local views of the owners, one for each layer that they hold."""
        return self.shards(owners, [p.detach() for p in owners])

    def grads(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """Local views of the owners' gradients, which have to be there, in the order of `weights`.

        A gradient that is a DTensor of partial sums, as sequence parallelism leaves it for the weights of norms, is
        added up first, and replaced: then every rank has to call it. Raises ValueError for a sparse gradient.
        """
        if any(p.grad.layout is not torch.strided for p in owners):  # type: ignore[union-attr]
            raise ValueError("sparse gradients have no sharded update: use nn.Embedding(sparse=False)")
        for p in owners:
            if any(placement.is_partial() for placement in getattr(p.grad, "placements", ())):
                p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[union-attr, attr-defined]
        return self.shards(owners, [p.grad for p in owners])  # type: ignore[misc]

    def shards(self, owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Local views of tensors that lie as these owners, one for each layer that each holds."""
        if self._whole and all(type(tensor) in PLAIN for tensor in tensors):  # nothing to cut, which is soon said
            return list(tensors)
        return [shard for p, tensor in zip(owners, tensors) for shard in self.split(p, tensor)]

    def placement(self, owner: Tensor) -> tuple[DeviceMesh, tuple[Any, ...]] | None:
        """The mesh and the placements of a parameter's state; None where the state is a plain tensor."""
        if not hasattr(owner, "placements"):
            return None
        return owner.device_mesh, tuple(owner.placements)  # type: ignore[attr-defined]

    def zeros(self, owner: Tensor) -> Tensor:
        """A new state buffer for a parameter: sharded as this rank steps the parameter, in float32 or wider."""
        return torch.zeros_like(owner, dtype=wide(owner.dtype), requires_grad=False)

    def master(self, owner: Tensor) -> Tensor:
        """The float32 copy of a 16-bit parameter that the optimizer steps in its place, sharded as its state is."""
        return owner.detach().to(wide(owner.dtype), copy=True)

    def refresh_master(self, owner: Tensor, master: Tensor) -> None:
        """Gives a master those weights of its parameter that it does not round to: somebody has changed them.

        Elementwise, so that the other weights keep what 16 bits do not hold. Nothing is read back to the host.
        """
        for low, high in zip(self.split(owner, owner.detach()), self.split(owner, master)):
            high.copy_(torch.where(high.to(low.dtype) == low, high, low.to(high.dtype)))

    def round_master(self, owner: Tensor, master: Tensor) -> None:
        """Gives a parameter the weights of its master, rounded to the nearest."""
        torch._foreach_copy_(self.split(owner, owner.detach()), self.split(owner, master))

    def moved(self, copied: Callable[[Tensor], Tensor]) -> Self:
        """The same layout for copies of its parameters."""
        return replace(
            self,
            segments={copied(p): segments for p, segments in self.segments.items()},
            params=tuple(copied(p) for p in self.params),
            model=self.model and self.model.moved(copied),
            gradients=self.gradients and self.gradients.moved(copied),
        )

    def tensors_to_back_up(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """Local tensors that change when every rank moves its `weights` and publishes them."""
        return self.weights(owners)

    def own_shards_of(self, owners: Sequence[Tensor], touched: Sequence[Tensor]) -> list[Tensor]:
        """Of copies of what is `touched`, the views that are in the places of `weights`."""
        return list(touched)

    def publish(self, owners: Iterable[Tensor]) -> None:
        """After weights moved: gives the other ranks what they hold copies of. Every rank has to call it."""

    def wait(self) -> None:
        """Until what others have published is there."""

    @torch.no_grad()
    def norms(self, layers: Sequence[int], *shards: Sequence[Tensor]) -> list[Tensor]:
        """The global 2-norm of every layer, for each of these lists of shards.

            norm[i] = sqrt(sum over ranks and over shards of layer i of |shard|^2)

        One all-reduce per mesh axis that shards, of `len(shards) * num_layers` numbers in 16 digits each, whatever the
        number of tensors; none where nothing is sharded. Every rank has to call it, also one that holds nothing.
        Nothing is read back to the host; inf and nan propagate to every rank.

        On the CPU the result is the same bits on every layout that shards between rows, at every number of ranks: the
        sums of blocks of rows are added without rounding. A layout that shards within rows (tensor
        parallelism, DeepSpeed), and a GPU, which sums each shard by itself, differ by rounding.

        layers: the layer of each shard, as `self.layers` gives it.
        Returns one float64 tensor of shape [num_layers] for each list.
        """
        rows = self.rows(layers)
        return list(self.total(layers, *(squared_norms(each, rows) for each in shards)).sqrt_())

    @torch.no_grad()
    def dots(self, layers: Sequence[int], *pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """The inner product of every layer, for each of these pairs of lists of shards; as `norms`, and at its cost.

        dot[i] = sum over ranks and over shards of layer i of a . b
        """
        rows = self.rows(layers)
        return list(self.total(layers, *(products(a, b, rows) for a, b in pairs)))

    @torch.no_grad()
    def total(self, layers: Sequence[int], *columns: Tensor) -> Tensor:
        """The sum for every layer, over all ranks, of what each column has for its shards: [len(columns), num_layers].

        One all-reduce per mesh axis that shards. Every rank has to call it, with the same number of columns.

        layers: the layer of each shard.
        columns: numbers in digits of `distopt.kernels.exact`, [len(layers), exact.DIGITS] each.
        """
        size = (len(columns), self.num_layers, exact.DIGITS)
        sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        if layers:
            stacked = torch.stack(columns).to(self.device)
            if not self._all_counted:
                keep = tuple(i for i, layer in enumerate(layers) if self.counted[layer])
                layers, stacked = [layers[i] for i in keep], stacked[:, self._indices.get(keep, self.device)]
            sums.index_add_(1, self._indices.get(tuple(layers), self.device), stacked)
        sums = sums.to(self.wire or self.device)
        for group in self.groups:
            dist.all_reduce(sums, group=group)
        return exact.value(sums.to(self.device))

    @functools.cached_property
    def _all_counted(self) -> bool:
        return all(self.counted)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    # By attribute, since importing DTensor takes half a second that users of plain tensors need not wait.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's state, and of its master: float32, or the parameter's own where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that an optimizer may step: those that ask for a gradient, or have one from before a freeze."""
    return [p for p in params if p.requires_grad or p.grad is not None]


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [p for p in params if p.grad is not None]
