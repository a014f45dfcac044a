"""The reduce-scatter of gradients as a communication hook of DDP: ZeRO-1 then sends no more than plain DDP."""

# No `from __future__ import annotations`: DDP of torch 2.13 compares the annotations of a hook with types.

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.exchange import GradientExchange
from distopt.layout.messages import over_gloo
from distopt.layout.row_sharding import own_rows, pack, width


def hookable(model: nn.Module) -> DistributedDataParallel:
    """Returns the model if it can take the hook of `reduce_scatter_gradients`; raises ValueError otherwise."""
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"the reduce-scatter is a hook of DDP, got {type(model).__name__}: wrap it, or use gradients='all_reduce'"
        )
    if model._comm_hooks:
        raise ValueError(
            "DDP has a communication hook already, and takes only one: use gradients='all_reduce', which needs none"
        )
    return model


def reduce_scatter_gradients(
    model: DistributedDataParallel, group: "dist.ProcessGroup", dtype: torch.dtype | None
) -> GradientExchange | None:
    """Registers the DDP hook that reduces the rows of each gradient to the rank that owns them.

    Args:
        model: The DDP model, before its first backward pass.
        group: The ranks that share the rows.
        dtype: The dtype in which gradients are sent; None for their own.

    Returns:
        What follows the gradients; None for one rank, which needs no hook.
    """
    if dist.get_world_size(group) == 1:
        return None
    exchange = GradientExchange(model)
    model.register_comm_hook(group, _hook(dtype, exchange))
    return exchange


def _hook(
    dtype: torch.dtype | None, exchange: GradientExchange
) -> "Callable[[dist.ProcessGroup, dist.GradBucket], Future[Tensor]]":
    def reduce_scatter_rows(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
        """Leaves the mean in the rows of the bucket that this rank owns, and NaN elsewhere."""
        world, rank = group.size(), group.rank()
        buffer, params, grads = bucket.buffer(), bucket.parameters(), bucket.gradients()
        exchange.before(params, grads)
        widths = [width(g, world) for g in grads]
        gloo = over_gloo(group, buffer.device)
        # Over gloo only the rows of others. The padding is not read.
        send = buffer.new_empty(world - gloo, sum(widths), dtype=dtype or buffer.dtype)
        pack(send[: rank if gloo else world], grads, world)
        if gloo:
            pack(send[rank:], grads, world, rank + 1)
        work = (_all_to_all if gloo else _reduce_scatter)(send, group)

        def unpack_mean(future: Future[list[Tensor]]) -> Tensor:
            mine = [own_rows(g, world, rank) for g in grads]
            received = _sum(torch.atleast_2d(future.value()[0]), buffer.dtype)
            rows = [row[: to.numel()] for row, to in zip(received.split(widths), mine)]
            mean = [to.to(received.dtype) for to in mine] if gloo else rows
            if gloo:
                torch._foreach_add_(mean, rows)
            torch._foreach_div_(mean, world)
            torch._foreach_copy_(mine, mean)
            exchange.after(params, grads)
            return buffer

        return work.get_future().then(unpack_mean)

    return reduce_scatter_rows


def _all_to_all(send: Tensor, group: "dist.ProcessGroup") -> "dist.Work":
    """Starts sending each row of [world - 1, width] to its rank; the result is of this shape.

    For gloo, whose reduce-scatter (torch 2.13) is an all-reduce inside, at twice the bytes, and has no future.
    """
    rows = [int(i != group.rank()) for i in range(group.size())]
    return dist.all_to_all_single(torch.empty_like(send), send, rows, rows, group=group, async_op=True)


def _reduce_scatter(send: Tensor, group: "dist.ProcessGroup") -> "dist.Work":
    """Starts reducing each row of [world, width] to its rank; the result is one row, the sum."""
    return dist.reduce_scatter_single(torch.empty_like(send[0]), send.view(-1), group=group, async_op=True)


def _sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds up the rows in float32 or wider, in their order."""
    total, *rest = rows.unbind()
    total = total.to(torch.promote_types(dtype, torch.float32))
    for row in rest:
        total += row
    return total
