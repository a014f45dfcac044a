"""ZeRO-1 at the cost of DDP: gradients go, on DDP's own wire, only to the rank that steps their rows."""

# No `from __future__ import annotations`: DDP of torch 2.13 compares the annotations of a hook with types.

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.rows import pack, span, width
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
    which would skip every step. Clear the gradients before the next backward pass, or their sum is nan too. SAM
    perturbs rows and sends them: 4 (N-1)/N psi a step.

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
    layout = zero1(model.module, mesh)
    if dist.get_process_group_ranks(layout.mesh.get_group()) != dist.get_process_group_ranks(model.process_group):
        raise ValueError("the mesh and DDP's process_group are not the same ranks in the same order: give it DDP's")
    if layout.mesh.size() > 1:
        model.register_comm_hook(layout.mesh.get_group(), _hook(reduce_dtype))
    return layout.scattered(model.module, units)


def _hook(dtype: torch.dtype | None) -> "Callable[[dist.ProcessGroup, dist.GradBucket], Future[Tensor]]":
    def reduce_scatter_rows(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
        """Leaves the mean in the bucket's rows that this rank steps, and nan elsewhere."""
        world, rank = group.size(), group.rank()
        buffer, grads = bucket.buffer(), bucket.gradients()
        widths = [width(g, world) for g in grads]
        send = buffer.new_empty(world, sum(widths), dtype=dtype or buffer.dtype)  # what pads it is not read
        pack(send, grads)
        shape = send.shape  # not the tensor, which is free once it is sent

        def unpack_mean(future: Future[list[Tensor]]) -> Tensor:
            rows = _sum(future.value()[0], shape, buffer.dtype).div_(world).split(widths)
            spans = [span(g, world, rank) for g in grads]
            for g, (start, count) in zip(grads, spans):  # whoever reads there reads what no rank has
                g.view(-1)[:start].fill_(math.nan)
                g.view(-1)[start + count :].fill_(math.nan)
            mine = [g.view(-1).narrow(0, *at) for g, at in zip(grads, spans)]
            torch._foreach_copy_(mine, [row[:count] for row, (_, count) in zip(rows, spans)])
            return buffer

        return _exchange(send, group).then(unpack_mean)

    return reduce_scatter_rows


def _exchange(send: Tensor, group: "dist.ProcessGroup") -> Future[list[Tensor]]:
    """Starts the way of each row of [world, width] to its rank, (N-1)/N of the matrix; its future: what arrives."""
    if over_gloo(group, send.device):
        # Of torch 2.13: its reduce-scatter is an all-reduce inside, at twice the bytes, and has no future.
        received = torch.empty_like(send)
        work = dist.all_to_all_single(received, send, group=group, async_op=True)
    else:
        received = torch.empty_like(send[0])
        work = dist.reduce_scatter_single(received, send.view(-1), group=group, async_op=True)
    return work.get_future()


def _sum(arrived: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The rows of all ranks, added up in float32 or wider, always in the order of the ranks; or their sum, as it is."""
    wide = torch.promote_types(dtype, torch.float32)
    if arrived.shape != shape:
        return arrived.to(wide)
    total, *rest = arrived.unbind()
    total = total.to(wide)
    for row in rest:
        total += row
    return total
