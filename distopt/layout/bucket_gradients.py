"""Reduces the gradients in buckets to the ranks that own them, during the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layout.bucket import FRESH, Bucket
from distopt.layout.exchange import refuse_local
from distopt.layout.messages import others, over_gloo, receive, send

_IN_FLIGHT = 2  # exchanges that have scratch memory; without any all may be in flight


class BucketGradients:
    """The gradients of parameters in buckets: this rank's own until a pass exchanges them, then the mean.

    Afterwards they are right in this rank's ranges and NaN elsewhere. Buckets are exchanged in one order on all ranks,
    each once a backward pass has added to all of its parameters, so that the messages overlap the rest of the pass.

    Args:
        buckets: The buckets, in the order of the backward pass.
        group: The ranks that share the parameters.
        dtype: The dtype in which gradients are sent; None for their own.
        find_unused: Whether a pass may leave out parameters, on some ranks or on all.
    """

    def __init__(
        self, buckets: Sequence[Bucket], group: dist.ProcessGroup, dtype: torch.dtype | None, find_unused: bool
    ) -> None:
        self._buckets, self._group, self._dtype, self._find_unused = buckets, group, dtype, find_unused
        self._local: set[Tensor] = set()  # to which a backward pass has added since the last exchange
        self._poisoned: set[Bucket] = set()
        self._left: dict[Bucket, set[Tensor]] = {}  # in a pass: the parameters that it has not reached yet
        self._fresh: dict[Bucket, int] = {}  # elements of gradients that are not in the buffer
        self._exchange = False
        self._in_flight: list[tuple[Bucket, list[Tensor], list[dist.Work]]] = []
        self._launched = 0
        for bucket in buckets:
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    @contextlib.contextmanager
    def backward_pass(self, exchange: bool) -> Iterator[None]:
        """Around one backward pass; gradients are exchanged when it has ended.

        Args:
            exchange: False to leave them to a later pass.

        Raises:
            ValueError: If the pass exchanges and leaves out parameters that it may not.
        """
        self._left = {bucket: set(bucket.params) for bucket in self._buckets}
        self._fresh = dict.fromkeys(self._buckets, 0)
        self._exchange, self._launched = exchange and self._group.size() > 1, 0
        try:
            yield
            for bucket in self._buckets:
                bucket.adopt()
            if exchange:
                self._finish()
        finally:
            for _, _, works in self._in_flight:  # of a pass that raised
                for work in works:
                    work.wait()
            self._in_flight, self._left = [], {}

    def check(self, params: Iterable[Tensor]) -> None:
        """Raises ValueError if one of these gradients is of this rank alone."""
        refuse_local([p for p in params if p in self._local])

    def heal(self) -> None:
        """Makes gradients that were exchanged, and not cleared, such that a further pass may add to them."""
        for bucket in self._poisoned:
            if any(p.grad is view for p, view in zip(bucket.params, bucket.views)):
                bucket.heal()
        self._poisoned.clear()

    def _arrived(self, bucket: Bucket, param: Tensor) -> None:
        self._local.add(param)
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise ValueError("sparse gradients have no sharded update: use nn.Embedding(sparse=False)")
        if not self._left:  # a backward pass that is not a step's
            return
        if param not in self._left[bucket]:
            raise ValueError(
                f"a backward pass added twice to a parameter of shape {tuple(param.shape)}, as with reentrant "
                "activation checkpointing of shared weights: use use_reentrant=False"
            )
        self._left[bucket].discard(param)
        self._fresh[bucket] += param.numel()
        if self._fresh[bucket] >= FRESH or not self._left[bucket]:
            bucket.adopt()
            self._fresh[bucket] = 0
        if not self._left[bucket]:
            while self._exchange and self._launched < len(self._buckets) and not self._left[self._next]:
                self._launch()

    @property
    def _next(self) -> Bucket:
        return self._buckets[self._launched]

    def _finish(self) -> None:
        """Exchanges the buckets that are left, and waits for all."""
        missing = [p for bucket in self._buckets for p in bucket.params if p.grad is None and p.requires_grad]
        for bucket in self._buckets if missing else ():
            for p, view in zip(bucket.params, bucket.views):
                if p.grad is None:
                    view.zero_()
        while self._exchange and self._launched < len(self._buckets):
            self._launch()
        while self._in_flight:
            self._land()
        for bucket in self._buckets if self._group.size() == 1 else ():
            _fetch(bucket)
        if any(bucket.host is not None and bucket.grads.is_cuda for bucket in self._buckets):
            torch.cuda.current_stream().synchronize()
        self._local.clear()
        if self._find_unused and self._buckets:
            self._clear_unused()
        elif missing:
            raise ValueError(
                f"the backward pass left out {len(missing)} parameters, the first of shape {tuple(missing[0].shape)}: "
                "set engine.find_unused_parameters=true, or freeze them (requires_grad=False) before the engine "
                "builds the model"
            )

    def _launch(self) -> None:
        bucket = self._next
        self._launched += 1
        if over_gloo(self._group, bucket.grads.device):
            received, works = _swap(bucket, self._group, self._dtype)
        else:
            received, works = _reduce_scatter(bucket, self._group, self._dtype)
        self._in_flight.append((bucket, received, works))
        if received and len(self._in_flight) > _IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        """Waits for the oldest exchange, and leaves the mean in this rank's range of the bucket, NaN elsewhere."""
        bucket, received, works = self._in_flight.pop(0)
        for work in works:
            work.wait()
        with torch.no_grad():
            _average(bucket, received, self._group)
            _fetch(bucket)
            bucket.poison(bucket.grads)
        self._poisoned.add(bucket)

    def _clear_unused(self) -> None:
        """Gives every parameter that some rank has used its gradient, so that all ranks step the same ones."""
        params = [(p, view) for bucket in self._buckets for p, view in zip(bucket.params, bucket.views)]
        used = torch.tensor([p.grad is not None for p, _ in params], dtype=torch.uint8, device=params[0][1].device)
        if self._group.size() > 1:
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self._group)
        for (p, view), found in zip(params, used.tolist()):
            if found and p.grad is None:
                p.grad = view


def _fetch(bucket: Bucket) -> None:
    if bucket.host is not None:
        bucket.host.fetch_grads()


def _swap(bucket: Bucket, group: dist.ProcessGroup, dtype: torch.dtype | None) -> tuple[list[Tensor], list[dist.Work]]:
    """Starts sending each other rank its range: gloo's reduce-scatter (torch 2.13) sends twice the bytes."""
    sent = bucket.grads.to(dtype or bucket.grads.dtype)
    rows = bucket.rows(sent)
    received = torch.empty(group.size() - 1, rows[0].numel(), dtype=sent.dtype, device=sent.device)
    works = []
    for row, other in zip(received, others(group)):
        works += [send(rows[other], other, group), receive(row, other, group)]
    return [*received.unbind()], works


def _reduce_scatter(
    bucket: Bucket, group: dist.ProcessGroup, dtype: torch.dtype | None
) -> tuple[list[Tensor], list[dist.Work]]:
    """Starts a reduce-scatter, in place unless the dtype differs."""
    own = bucket.grads[bucket.own]
    if dtype in (None, own.dtype):
        return [], [dist.reduce_scatter_single(own, bucket.grads, group=group, async_op=True)]
    total = torch.empty_like(own, dtype=dtype)
    return [total], [dist.reduce_scatter_single(total, bucket.grads.to(dtype), group=group, async_op=True)]


def _average(bucket: Bucket, received: list[Tensor], group: dist.ProcessGroup) -> None:
    """Leaves the mean over the ranks in this rank's range, summed in float32 or wider over gloo."""
    own, world = bucket.grads[bucket.own], group.size()
    if not over_gloo(group, own.device):
        for total in received:
            own.copy_(total)
        own.div_(world)
        return
    wide = torch.promote_types(own.dtype, torch.float32)
    total = own if own.dtype == wide else own.to(wide)
    for row in received:
        total.add_(row)
    own.copy_(total.div_(world))
