"""ZeRO-1 over DDP: parameters are full on every rank, the optimizer's state is sharded by rows.

For DDP models of others, whose parameters and buckets stay as they are. `distopt.engine.Zero1` lays out its own models
in buckets (`distopt.layout.bucketed`), from which nothing has to be packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.base import Placement, ShardLayout
from distopt.layout.bucket_gradients import BucketGradients
from distopt.layout.exchange import GradientExchange, refuse_join
from distopt.layout.foreign import refuse_foreign
from distopt.layout.infer import infer_layout
from distopt.layout.param_sync import RowSync, overlapped
from distopt.layout.places import Segment
from distopt.layout.reduce_scatter import hookable, reduce_scatter_gradients
from distopt.layout.row_sharding import row_count, span
from distopt.layout.tensors import trained, wide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Zero1Layout(ShardLayout):
    """The rows of each plain parameter that this rank updates; `sync` sends them to the other ranks afterwards.

    The state is a DTensor `Shard(0)` of the parameter's own global shape, as under FSDP2, so that torch's distributed
    checkpoint converts it between engines and world sizes. A 0-D parameter has no rows: every rank updates it, and
    takes the first rank's value.

    Gradients are full on every rank, and `gradients` says so, or right in a rank's rows only
    (`zero1_layout(gradients="reduce_scatter")`).

    With units a step returns while rows are in flight, and each unit's forward pass waits for its own, the model's for
    all that are outside of units. A state dict waits, and so does `ShardedOptimizer.layout`; until then the rows of
    other ranks are NaN, so that a read by another way shows. Call `sync.wait()` before one.

    Attributes:
        mesh: One axis, over the ranks that share the parameters.
        exchange: Follows which gradients have been exchanged, with `gradients="reduce_scatter"`.
    """

    mesh: DeviceMesh = None  # type: ignore[assignment]
    exchange: GradientExchange | BucketGradients | None = None

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        return self.mesh.get_group() if self.mesh.size() < dist.get_world_size() else None

    def sharers(self, param: Tensor) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.mesh.get_group()))

    def split(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """Returns a flat view of this rank's rows of a parameter or gradient, or of its shard of a state."""
        return [tensor.to_local().view(-1)] if hasattr(tensor, "to_local") else self.split_local(param, tensor)

    def split_local(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        (segment,) = self.segments[param]
        return [tensor.view(-1).narrow(0, segment.start, segment.numel)]

    def grad_shards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """As in the base class.

        Raises:
            ValueError: Also for gradients that no backward pass has exchanged.
        """
        if self.exchange is not None:
            self.exchange.check(params)
        return super().grad_shards(params, grads)

    def placement(self, param: Tensor, per: int = 1) -> Placement | None:
        from torch.distributed.tensor import Shard

        return (self.mesh, (Shard(0),)) if param.ndim else None

    def zeros(self, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        own = self.split(param, param.detach())[0]
        return self._sharded(param, torch.zeros_like(own, dtype=dtype or wide(param.dtype)))

    def master(self, param: Tensor) -> Tensor:
        return self._sharded(param, self.split(param, param.detach())[0].to(wide(param.dtype), copy=True))

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Self:
        # The hooks that wait for units belong to the original model: a step of the copy waits on its own.
        self.sync.wait()
        return replace(super().copied(copy), sync=RowSync(self.mesh.get_group(), self.device))

    def _sharded(self, param: Tensor, rows: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        if param.ndim == 0:
            return rows.view(())
        count = row_count(param, self.mesh.size(), self.mesh.get_local_rank())
        local = rows.view(count, *param.shape[1:])
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride()
        )


def zero1_layout(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    gradients: Literal["all_reduce", "reduce_scatter"] = "all_reduce",
    reduce_dtype: torch.dtype | None = None,
    units: Sequence[nn.Module] = (),
) -> Zero1Layout:
    r"""Makes the layout of ZeRO-1 for a model whose parameters are full on every rank, as under DDP.

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
        mesh: One axis, over the ranks that have replicas. None takes those of DDP's process group, without DDP all
            ranks.
        gradients: `all_reduce` or `reduce_scatter`.
        reduce_dtype: The dtype in which `reduce_scatter` sends gradients, as FSDP2's; None for their own. bfloat16
            halves the bytes; on the CPU the sum is in float32 all the same.
        units: With `reduce_scatter`: blocks of the model, in the order of its forward pass, each of which waits for its
            own updated shards (see `Zero1Layout`); as under FSDP2, only a unit's own forward pass may use its
            parameters. Without them `step` waits.

    Raises:
        ValueError: If parameters are sharded already, or not contiguous; if the mesh has other ranks than DDP, since
            rows would come from models that are trained apart; for options of `reduce_scatter` without it; and, with
            `reduce_scatter`, if the model is not DDP or has a communication hook already.
    """
    if gradients not in ("all_reduce", "reduce_scatter"):
        raise ValueError(f"gradients must be all_reduce or reduce_scatter, got {gradients!r}")
    if gradients == "all_reduce":
        if reduce_dtype is not None or units:
            raise ValueError(
                "reduce_dtype and units are options of the reduce-scatter: give gradients='reduce_scatter'"
            )
        return _all_reduced(model, mesh)
    ddp = hookable(model)
    layout = _all_reduced(ddp, mesh)
    group = layout.mesh.get_group()
    exchange = reduce_scatter_gradients(ddp, group, reduce_dtype)
    return replace(layout, gradients=None, exchange=exchange, sync=overlapped(group, layout.device, ddp.module, units))


def _all_reduced(model: nn.Module, mesh: DeviceMesh | None) -> Zero1Layout:
    """Makes the layout for gradients that are full on every rank."""
    params = trained(model.parameters())
    for name, p in model.named_parameters():
        if hasattr(p, "placements"):
            raise ValueError(f"{name} is sharded already ({p.placements}): ZeRO-1 is for DDP; FSDP2 needs no layout")
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous, so its rows cannot be sharded: make it contiguous first")
    refuse_foreign(params)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_forward_pre_hook(refuse_join)
    device = params[0].device if params else torch.device("cpu")
    mesh = _mesh(model, device, mesh)
    world, rank = mesh.size(), mesh.get_local_rank()
    full = infer_layout(params)
    return Zero1Layout(
        segments={p: (Segment(i, *(rows := span(p, world, rank)), rows[0]),) for i, p in enumerate(params)},
        params=tuple(params),
        device=device,
        groups=(mesh.get_group(),) if world > 1 else (),
        counted=tuple(p.ndim > 0 or rank == 0 for p in params),
        model=full,
        gradients=full,
        sync=RowSync(mesh.get_group(), device),
        mesh=mesh,
    )


def _mesh(model: nn.Module, device: torch.device, given: DeviceMesh | None) -> DeviceMesh:
    """Returns the ranks that have copies of a model: those among which DDP exchanges its gradients."""
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
