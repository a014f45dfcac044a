"""ZeRO-1 at the cost of DDP: gradients go, on DDP's own wire, only to the rank that steps their rows."""

# No `from __future__ import annotations`: DDP of torch 2.13 compares the annotations of a hook with types.

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.exchange import GradientExchange
from distopt.layout.row_sharding import pack, span, width
from distopt.layout.zero1 import Zero1Layout, over_gloo, zero1

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def zero1_scattered(
    model: nn.Module,
    mesh: "DeviceMesh | None" = None,
    reduce_dtype: torch.dtype | None = None,
    units: Sequence[nn.Module] = (),
) -> Zero1Layout:
    r"""The layout of ZeRO-1 for a DDP model whose gradients are reduce-scattered from now on, and not all-reduced.

        optimizer.bind(distopt.layout.zero1_scattered(ddp))

    With N ranks and parameters of psi bytes each rank sends (N-1)/N psi of gradients and (N-1)/N psi of stepped rows:
    the 2 (N-1)/N psi of plain DDP, where `zero1` sends half as much again. Registers DDP's communication hook, so the
    exchange runs beside the backward pass, bucket by bucket, and `no_sync` puts it off.

    After a backward pass that exchanges, `.grad` is the mean over the ranks in the rows that this rank steps, and nan
    in all others. So clip by `distopt.clip_grad_norm_`: torch's function sees nan, and so does its GradScaler (fp16),
    which would skip every step. A later backward pass may add to such gradients: their sum is right again once it has
    exchanged them. `step` raises ValueError for gradients that were not exchanged since (`no_sync`), and the forward
    pass under torch's Join, where ranks take unlike numbers of steps. SAM perturbs rows and sends them:
    4 (N-1)/N psi per step.

    model: DDP, before its first backward pass. mesh: as for `zero1`; it has to be of DDP's own ranks.
    reduce_dtype: in which gradients are sent, as FSDP2's; None for their own. bfloat16 halves the bytes; on the CPU the
        sum is in float32 all the same.
    units: blocks of the model, in the order of its forward pass, that may wait for their stepped rows by themselves
        (see `Zero1Layout`); as under FSDP2 only a unit's own forward may use its parameters. None: `step` waits.
    Raises ValueError as `zero1`; for a model that is not DDP, has a hook already, or has other ranks than the mesh.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"the reduce-scatter is a hook of DDP, got {type(model).__name__}: wrap it, or use zero1")
    if model._comm_hooks:
        raise ValueError("DDP has a communication hook already, and takes only one: use zero1, which needs none")
    layout = zero1(model, mesh)
    exchange = None
    if layout.mesh.size() > 1:
        exchange = GradientExchange(model)
        model.register_comm_hook(layout.mesh.get_group(), _hook(reduce_dtype, exchange))
    return layout.scattered(model.module, units, exchange)


def _hook(
    dtype: torch.dtype | None, exchange: GradientExchange
) -> "Callable[[dist.ProcessGroup, dist.GradBucket], Future[Tensor]]":
    def reduce_scatter_rows(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
        """Leaves the mean in the bucket's rows that this rank steps, and nan elsewhere."""
        world, rank = group.size(), group.rank()
        buffer, params, grads = bucket.buffer(), bucket.parameters(), bucket.gradients()
        exchange.before(params, grads)
        widths = [width(g, world) for g in grads]
        gloo = over_gloo(group, buffer.device)
        # Over gloo others' rows only. What pads them is not read.
        send = buffer.new_empty(world - gloo, sum(widths), dtype=dtype or buffer.dtype)
        pack(send[: rank if gloo else world], grads, world)
        if gloo:
            pack(send[rank:], grads, world, rank + 1)
        work = (_all_to_all if gloo else _reduce_scatter)(send, group)

        def unpack_mean(future: Future[list[Tensor]]) -> Tensor:
            mine = [g.view(-1).narrow(0, *span(g, world, rank)) for g in grads]
            arrived = _sum(torch.atleast_2d(future.value()[0]), buffer.dtype)
            rows = [row[: to.numel()] for row, to in zip(arrived.split(widths), mine)]
            mean = [to.to(arrived.dtype) for to in mine] if gloo else rows
            if gloo:
                torch._foreach_add_(mean, rows)
            torch._foreach_div_(mean, world)
            torch._foreach_copy_(mine, mean)
            exchange.after(params, grads)
            return buffer

        return work.get_future().then(unpack_mean)

    return reduce_scatter_rows


def _all_to_all(send: Tensor, group: "dist.ProcessGroup") -> "dist.Work":
    """Starts the way of each row of [world - 1, width] to its rank; what arrives is of this shape.

    Over gloo, whose reduce-scatter (of torch 2.13) is an all-reduce inside, at twice the bytes, and has no future.
    """
    rows = [int(i != group.rank()) for i in range(group.size())]
    return dist.all_to_all_single(torch.empty_like(send), send, rows, rows, group=group, async_op=True)


def _reduce_scatter(send: Tensor, group: "dist.ProcessGroup") -> "dist.Work":
    """Starts the way of each row of [world, width] to its rank; what arrives is one row, their sum."""
    return dist.reduce_scatter_single(torch.empty_like(send[0]), send.view(-1), group=group, async_op=True)


def _sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows in float32 or wider, in their order."""
    total, *rest = rows.unbind()
    total = total.to(torch.promote_types(dtype, torch.float32))
    for row in rest:
        total += row
    return total
