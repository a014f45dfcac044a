"""Where each layer lives: the only thing an engine has to tell an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 on the CPU sums the squares of a float32 tensor in a few long chains: `vector_norm` of 5e7 random numbers
# is off by 4e-3, of 65,536 equal ones by 4e-5. Rows of this length keep the error below 3e-7, at the same speed.
_ROW = 256
_PLAIN = (Tensor, torch.nn.Parameter)
_PIECE = 2**14  # an inner product of so many numbers is off by less than 1e-6


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
    """

    segments: Mapping[Tensor, tuple[Segment, ...]]
    params: tuple[Tensor, ...]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()
    counted: tuple[bool, ...] = ()
    model: ShardLayout | None = None
    gradients: ShardLayout | None = None
    wire: torch.device | None = None
    _indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self.segments

    @functools.cached_property
    def _whole(self) -> bool:
        """Whether every rank holds every layer whole, each in a plain tensor of its own."""
        alone = [held[0].numel == p.numel() if len(held) == 1 else False for p, held in self.segments.items()]
        return not self.groups and all(alone) and all(type(p) in _PLAIN for p in self.segments)

    @property
    def num_layers(self) -> int:
        """How many layers there are over all ranks."""
        return len(self.params)

    def owners(self, group: int, params: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that an optimizer steps for its param group of that number, given the params it lists there."""
        return trained(params)

    def layers(self, owners: Iterable[Tensor]) -> list[int]:
        """The layer of each shard that `split` gives for these owners, in the same order."""
        return [segment.layer for owner in owners for segment in self.segments[owner]]

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
        """Local views of the owners' gradients, which have to be there, in the order of `weights`."""
        return self.shards(owners, [p.grad for p in owners])  # type: ignore[misc]

    def shards(self, owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Local views of tensors that lie as these owners, one for each layer that each holds."""
        if self._whole and all(type(tensor) in _PLAIN for tensor in tensors):  # nothing to cut, which is soon said
            return list(tensors)
        return [shard for p, tensor in zip(owners, tensors) for shard in self.split(p, tensor)]

    def zeros(self, owner: Tensor) -> Tensor:
        """A new state buffer for a parameter, cut up as this rank steps it."""
        return torch.zeros_like(owner, requires_grad=False)

    def master(self, owner: Tensor) -> Tensor | None:
        """A copy of a parameter's shard in float32 that is stepped in its place, where the layout keeps one."""
        return None

    def touched(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """Local tensors that change when every rank moves its `weights` and publishes them."""
        return self.weights(owners)

    def within(self, owners: Sequence[Tensor], touched: Sequence[Tensor]) -> list[Tensor]:
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

        One all-reduce per mesh axis that shards, of `len(shards) * num_layers` numbers, whatever the number of
        tensors; none where nothing is sharded. Every rank has to call it, also one that holds nothing. Nothing is read
        back to the host; inf and nan propagate to every rank.

        layers: the layer of each shard, as `self.layers` gives it.
        Returns one float64 tensor of shape [num_layers] for each list.
        """
        return list(self.total(layers, *map(squared_norms, shards)).sqrt_())

    @torch.no_grad()
    def dots(self, layers: Sequence[int], *pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """The inner product of every layer, for each of these pairs of lists of shards; as `norms`, and at its cost.

        dot[i] = sum over ranks and over shards of layer i of a . b
        """
        return list(self.total(layers, *(_products(a, b) for a, b in pairs)))

    @torch.no_grad()
    def total(self, layers: Sequence[int], *columns: Tensor) -> Tensor:
        """The sum for every layer, over all ranks, of what each column has for its shards: [len(columns), num_layers].

        One all-reduce per mesh axis that shards. Every rank has to call it, with the same number of columns.
        """
        sums = torch.zeros(len(columns), self.num_layers, dtype=torch.float64, device=self.device)
        if layers:
            index, keep = self._index(tuple(layers))
            sums.index_add_(1, index, torch.stack(columns).to(self.device)[:, keep])
        sums = sums.to(self.wire or self.device)
        for group in self.groups:
            dist.all_reduce(sums, group=group)
        return sums.to(self.device)

    def _index(self, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The layers that this rank contributes, and where they stand in the list."""
        # Kept, because making it copies from the host, which waits for the device.
        if layers not in self._indices:
            keep = [i for i, layer in enumerate(layers) if not self.counted or self.counted[layer]]
            index = torch.tensor([layers[i] for i in keep], device=self.device, dtype=torch.int64)
            self._indices[layers] = (index, torch.tensor(keep, device=self.device, dtype=torch.int64))
        return self._indices[layers]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    # By attribute, since importing DTensor takes half a second that users of plain tensors need not wait.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that an optimizer may step: those that ask for a gradient, or have one from before a freeze."""
    return [p for p in params if p.requires_grad or p.grad is not None]


def of(params: Iterable[Tensor]) -> ShardLayout:
    """The layout that the parameters themselves tell: plain ones are whole on every rank, DTensors lie as placed.

    DDP, FSDP2, HSDP and tensor parallelism, mixed too: a parameter that is replicated along an axis that cuts others
    is counted once. Raises ValueError for partial placements and for meshes that are not axes of one.
    """
    params = list(params)
    axes = [_sharding_groups(p) for p in params]
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for held in axes:
        groups = held | groups
    _check_one_mesh(params, groups)
    return ShardLayout(
        segments={p: (Segment(i, 0, local(p).numel()),) for i, p in enumerate(params)},
        params=tuple(params),
        device=params[0].device if params else torch.device("cpu"),
        groups=tuple(groups.values()),
        counted=tuple(all(dist.get_rank(g) == 0 for ranks, g in groups.items() if ranks not in held) for held in axes),
    )


def _sharding_groups(param: Tensor) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """The groups of the mesh axes of more than one rank along which a parameter is cut, by their ranks.

    Not by name: torch 2.13 keeps what it has found out for one mesh for all that are equal to it, so that parameters of
    a process that has made such a mesh before lie on the one or on the other.
    """
    placements = getattr(param, "placements", ())
    if any(p.is_partial() for p in placements):
        raise ValueError(f"a parameter has placements {placements}: partial sums have no norm; redistribute it first")
    mesh: Any = getattr(param, "device_mesh", None)
    cut = [mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    return {tuple(dist.get_process_group_ranks(group)): group for group in cut}


def _check_one_mesh(params: Sequence[Tensor], groups: Mapping[tuple[int, ...], dist.ProcessGroup]) -> None:
    """Sums over several axes count each element once only if the axes are those of one mesh."""
    if len(groups) < 2:
        return
    mesh = max((p.device_mesh for p in params if hasattr(p, "device_mesh")), key=lambda mesh: mesh.ndim)
    if not groups.keys() <= {tuple(dist.get_process_group_ranks(mesh.get_group(i))) for i in range(mesh.ndim)}:
        meshes = {str(p.device_mesh) for p in params if hasattr(p, "device_mesh")}
        raise ValueError(f"parameters are sharded on meshes that are not axes of one: {sorted(meshes)}; build one mesh")


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared 2-norm of each tensor, in float64; on a GPU summed in float32, unless one of them is float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = any(t.dtype == torch.float64 or t.device.type == "cpu" for t in tensors)
    rows = [_row_norms(t) for t in tensors]
    return torch.stack(torch._foreach_norm(rows, 2.0, torch.float64 if wide else torch.float32)).double().square_()


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair, in float64; on the CPU of pieces that float32 sums well enough."""
    dots = [_dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return torch.stack(dots) if dots else torch.zeros(0, dtype=torch.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    size = _PIECE if a.device.type == "cpu" else _PIECE * 2**10
    wide = torch.promote_types(a.dtype, torch.float32)  # torch rounds the product of 16 bits to 16 bits
    pieces = zip(a.split(size), b.split(size))
    return torch.stack([torch.dot(x.to(wide), y.to(wide)).double() for x, y in pieces]).sum()


def _row_norms(tensor: Tensor) -> Tensor:
    """The norms of a long CPU tensor's rows and of the rest: fewer numbers with the same norm. Others as they are."""
    if tensor.numel() <= 8 * _ROW or tensor.device.type != "cpu" or tensor.dtype == torch.float64:
        return tensor
    flat, whole = tensor.reshape(-1), tensor.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    if whole < tensor.numel():
        rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32, keepdim=True)
        norms = torch.cat([norms, rest])
    return norms.double()
