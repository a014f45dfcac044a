"""ZeRO-1: parameters and gradients whole on every rank (DDP), the optimizer's state cut by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.base import Segment, ShardLayout, trained, wide
from distopt.layout.exchange import GradientExchange, refuse_join
from distopt.layout.foreign import refuse_foreign
from distopt.layout.infer import infer_layout
from distopt.layout.reduce_scatter import hookable, reduce_scatter_gradients
from distopt.layout.row_sharding import over_gloo, poison_remote_rows, rows_of, span, swap, unpack, width

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

# Elements of one exchange, of which two are under way: bounds their scratch memory. Below 32 MB the C library gives the
# same memory again in the next step; above, every page of it would be new, which costs as much as sending it.
_BUCKET = 2**22


@dataclass(frozen=True, eq=False)
class Zero1Layout(ShardLayout):
    """Every rank steps its rows of each plain parameter, and then sends them to the others: (N-1)/N of their bytes.

    The state is a DTensor `Shard(0)` of the parameter's own global shape, as FSDP2 has it, so that torch's distributed
    checkpoint moves it between engines and world sizes. A 0-D parameter has no rows: every rank steps it, and takes the
    first rank's.

    Gradients are whole on every rank, and `gradients` says so, or right in a rank's rows only
    (`gradients="reduce_scatter"`).

    With `units` a step returns while rows are on their way, beside the next forward pass: each unit's forward waits for
    its own, the model's for all that lie outside of units. A state dict waits, and who asks the optimizer for its
    layout; until then others' rows are nan, so that a read by another way shows. Call `wait` before one. Scratch memory
    is then the model's size, else two buckets' (over gloo none).
    """

    mesh: DeviceMesh = None  # type: ignore[assignment]
    units: tuple[frozenset[Tensor], ...] = ()
    exchange: GradientExchange | None = None
    _coming: list[_Gather] = field(default_factory=list, init=False, repr=False)
    _whole = False  # also of one rank, whose state is a DTensor

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        return self.mesh.get_group() if self.mesh.size() < dist.get_world_size() else None

    def split(self, owner: Tensor, tensor: Tensor) -> list[Tensor]:
        """This rank's rows of a parameter or gradient; its shard of a state."""
        if hasattr(tensor, "to_local"):
            return [tensor.to_local().view(-1)]
        (segment,) = self.segments[owner]
        return [tensor.view(-1).narrow(0, segment.start, segment.numel)]

    def grads(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """As in the base class. Raises ValueError for gradients that no backward pass has exchanged."""
        if self.exchange is not None:
            self.exchange.check(owners)
        return super().grads(owners)

    def tensors_to_back_up(self, owners: Iterable[Tensor]) -> list[Tensor]:
        return [p.detach() for p in owners]

    def own_shards_of(self, owners: Sequence[Tensor], touched: Sequence[Tensor]) -> list[Tensor]:
        return [shard for p, copy in zip(owners, touched) for shard in self.split(p, copy)]

    def placement(self, owner: Tensor) -> tuple[DeviceMesh, tuple[Any, ...]] | None:
        from torch.distributed.tensor import Shard

        return (self.mesh, (Shard(0),)) if owner.ndim else None

    def zeros(self, owner: Tensor) -> Tensor:
        return self._sharded(owner, torch.zeros_like(self.split(owner, owner.detach())[0], dtype=wide(owner.dtype)))

    def master(self, owner: Tensor) -> Tensor:
        return self._sharded(owner, self.split(owner, owner.detach())[0].to(wide(owner.dtype), copy=True))

    def moved(self, copied: Callable[[Tensor], Tensor]) -> Self:
        """The hooks that wait for units stay with the model that has them: a step of the copy waits by itself."""
        self.wait()
        return replace(super().moved(copied), units=())

    def publish(self, owners: Iterable[Tensor]) -> None:
        """Sends this rank's rows to all others and takes theirs: one all-gather for each bucket of parameters.

        Over gloo, unless units wait for them, by messages that need no buckets.
        """
        self.wait()
        if self.mesh.size() == 1:
            return
        if not self.units and over_gloo(self.mesh.get_group(), self.device):
            swap([p.detach() for p in owners], self.mesh.get_group())
            return
        for bucket in self._buckets(list(owners)):
            if not self.units and len(self._coming) > 1:  # one is unpacked while the next is on its way
                self._coming.pop(0).finish()
            self._coming.append(_Gather(self, bucket))
        if self.units:
            for gather in self._coming:
                gather.mark()
        else:
            self.wait()

    def wait(self, params: frozenset[Tensor] | None = None) -> None:
        """Until all rows have come that `publish` has asked for, or those of these parameters."""
        while self._coming and (params is None or any(gather.holds(params) for gather in self._coming)):
            self._coming.pop(0).finish()

    def scattered(self, model: nn.Module, units: Sequence[nn.Module], exchange: GradientExchange | None) -> Zero1Layout:
        """The same rows where gradients are right in them only; with the hooks of the model that wait for units."""
        inside = [frozenset(unit.parameters()) for unit in units]
        held = [frozenset(model.parameters()).difference(*inside), *inside] if units else []
        layout = replace(self, gradients=None, units=tuple(held), exchange=exchange)
        for unit, params in zip((model, *units), held):
            unit.register_forward_pre_hook(lambda module, args, params=params: layout.wait(params))
        for module in model.modules() if units else ():
            module.register_state_dict_pre_hook(lambda *_: layout.wait())
            module.register_load_state_dict_pre_hook(lambda *_: layout.wait())  # or they would come after
        return layout

    def _buckets(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Runs of parameters that one all-gather moves; those that units share come with the first of these."""
        left = dict.fromkeys(params)
        for unit in self.units or [frozenset(params)]:
            yield from _buckets([p for p in params if p in unit and p in left])
            left = {p: None for p in left if p not in unit}

    def _sharded(self, owner: Tensor, rows: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        if owner.ndim == 0:
            return rows.view(())
        count = rows_of(owner, self.mesh.size(), self.mesh.get_local_rank())
        local = rows.view(count, *owner.shape[1:])
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=owner.shape, stride=owner.stride()
        )


def zero1_layout(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    gradients: str = "all_reduce",
    reduce_dtype: torch.dtype | None = None,
    units: Sequence[nn.Module] = (),
) -> Zero1Layout:
    r"""The layout of ZeRO-1 for a model whose parameters are full on every rank, as under DDP.

        optimizer.bind(distopt.layout.zero1_layout(ddp, gradients="reduce_scatter"))

    With N ranks and parameters of psi bytes each rank sends, for every step, (N-1)/N psi of updated shards and

        all_reduce:      2 (N-1)/N psi of gradients, by DDP itself: `.grad` is full
        reduce_scatter:  (N-1)/N psi of gradients, so that the step sends what plain DDP does

    `reduce_scatter` registers DDP's communication hook: the exchange overlaps the backward pass, bucket by bucket, and
    `no_sync` postpones it. After a backward pass that exchanges, `.grad` is the mean over the ranks in the rows that
    this rank updates, and NaN in all others. Clip by `distopt.clip_grad_norm_`: torch's function sees NaN, and so does
    its GradScaler (fp16), which would skip every step. A later backward pass may add to such gradients: their sum is
    right again once it has exchanged them. `step` raises ValueError for gradients that were not exchanged since
    (`no_sync`), and the forward pass raises it under torch's Join, where ranks take different numbers of steps. SAM
    perturbs its rows and sends them: 4 (N-1)/N psi per step.

    Args:
        model: DDP, before its first backward pass; with `all_reduce` also the model inside, which does not know DDP's
            process group.
        mesh: One axis, over the ranks that hold replicas. None takes those of DDP's process group, without DDP all
        ranks.
        gradients: `all_reduce` or `reduce_scatter`.
        reduce_dtype: The dtype in which `reduce_scatter` sends gradients, as FSDP2's; None for their own. bfloat16
        halves
            the bytes; on the CPU the sum is in float32 all the same.
        units: With `reduce_scatter`: blocks of the model, in the order of its forward pass, each of which waits for its
            own updated shards (see `Zero1Layout`); as under FSDP2, only a unit's own forward pass may use its
            parameters. Without them `step` waits.

    Raises:
        ValueError: If parameters are sharded already, or not contiguous; if the mesh has other ranks than DDP, since
        rows
            would come from models that are trained apart; for options of `reduce_scatter` without it; and, with
            `reduce_scatter`, if the model is not DDP or has a communication hook already.
    """
    if gradients not in ("all_reduce", "reduce_scatter"):
        raise ValueError(f"gradients must be all_reduce or reduce_scatter, got {gradients!r}")
    if gradients == "all_reduce":
        if reduce_dtype is not None or units:
            raise ValueError(
                "reduce_dtype and units are options of the reduce-scatter: give gradients='reduce_scatter'"
            )
        return _replicated(model, mesh)
    ddp = hookable(model)
    layout = _replicated(ddp, mesh)
    exchange = reduce_scatter_gradients(ddp, layout.mesh.get_group(), reduce_dtype)
    return layout.scattered(ddp.module, units, exchange)


def _replicated(model: nn.Module, mesh: DeviceMesh | None) -> Zero1Layout:
    """The layout for gradients that are full."""
    params = trained(model.parameters())
    for name, p in model.named_parameters():
        if hasattr(p, "placements"):
            raise ValueError(f"{name} is sharded already ({p.placements}): ZeRO-1 is for DDP; FSDP2 needs no layout")
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous, so its rows cannot be cut: make it contiguous first")
    refuse_foreign(params)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_forward_pre_hook(refuse_join)
    device = params[0].device if params else torch.device("cpu")
    mesh = _mesh(model, device, mesh)
    world, rank = mesh.size(), mesh.get_local_rank()
    return Zero1Layout(
        segments={p: (Segment(i, *(rows := span(p, world, rank)), rows[0]),) for i, p in enumerate(params)},
        params=tuple(params),
        device=device,
        groups=(mesh.get_group(),) if world > 1 else (),
        counted=tuple(p.ndim > 0 or rank == 0 for p in params),
        model=(whole := infer_layout(params)),
        gradients=whole,
        mesh=mesh,
    )


def _mesh(model: nn.Module, device: torch.device, given: DeviceMesh | None) -> DeviceMesh:
    """The ranks that hold copies of a model: those among which DDP exchanges its gradients."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    groups = [module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)]
    meshes = [given] if given else [DeviceMesh.from_group(groups[0], device.type)] if groups else []
    mesh = meshes[0] if meshes else init_device_mesh(device.type, (dist.get_world_size(),))
    ranks = dist.get_process_group_ranks(mesh.get_group())
    if others := [other for other in map(dist.get_process_group_ranks, groups) if other != ranks]:
        raise ValueError(
            f"the rows are of ranks {ranks}, and DDP exchanges gradients among ranks {others[0]}: the mesh has to be "
            "of DDP's process_group, its ranks in the same order; leave it out, and DDP's is taken"
        )
    return mesh


class _Gather:
    """An all-gather of the rows of some parameters that is under way."""

    def __init__(self, layout: Zero1Layout, params: list[Tensor]) -> None:
        self._layout, self._owners, self._params = layout, params, [p.detach() for p in params]
        world, group = layout.mesh.size(), layout.mesh.get_group()
        widths, rank = [width(p, world) for p in params], layout.mesh.get_local_rank()
        self._all = params[0].new_empty(world, sum(widths))  # what a rank lacks rows for is sent as it is, and not read
        rows = layout.weights(params)
        mine = self._all[rank].split(widths)
        torch._foreach_copy_([to[: row.numel()] for to, row in zip(mine, rows)], rows)
        self._works = all_gather(self._all, rank, group)

    def holds(self, params: frozenset[Tensor]) -> bool:
        return not params.isdisjoint(self._owners)

    def mark(self) -> None:
        """Makes nan of the other ranks' rows, which are still those of before."""
        poison_remote_rows(self._params, self._layout.mesh.size(), self._layout.mesh.get_local_rank())

    def finish(self) -> None:
        for work in self._works:
            work.wait()
        world, rank = self._layout.mesh.size(), self._layout.mesh.get_local_rank()
        unpack(self._params, self._all[:rank], world)
        unpack(self._params, self._all[rank + 1 :], world, rank + 1)


def all_gather(matrix: Tensor, rank: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Starts the way of each rank's row of a matrix to all others; what has to be waited for."""
    if over_gloo(group, matrix.device):
        # Of torch 2.13: its all-gather takes four times as long as these broadcasts, of the same bytes.
        return [dist.broadcast(row, group=group, group_src=i, async_op=True) for i, row in enumerate(matrix)]
    return [dist.all_gather_single(matrix.view(-1), matrix[rank], group=group, async_op=True)]


def _buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype, in runs of at most _BUCKET elements."""
    for dtype in dict.fromkeys(p.dtype for p in params):
        bucket: list[Tensor] = []
        held = 0
        for p in (p for p in params if p.dtype == dtype):
            held += p.numel()
            if bucket and held > _BUCKET:
                yield bucket
                bucket, held = [], p.numel()
            bucket.append(p)
        yield bucket
