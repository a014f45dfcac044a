"""Which gradients of a DDP model are the mean over the ranks, and which are still this rank's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distopt.layout.row_sharding import poison_remote_rows, span


class GradientExchange:
    """Follows the gradients of a DDP model whose communication hook leaves the mean in this rank's rows only.

    A gradient is *local* from the moment a backward pass adds to it until the hook has exchanged it. It is *poisoned*
    from then on: the mean in this rank's rows, NaN in all others. When a later backward pass adds to a poisoned
    gradient, it is first made one rank's share of that mean: this rank's rows times the number of ranks, and zero
    elsewhere. The next exchange then gives the sum of both means, as an all-reduce would.

    Args:
        model: The DDP model.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._group = model.process_group
        self._local: set[Tensor] = set()
        self._poisoned: set[Tensor] = set()
        for param in (p for p in model.parameters() if p.requires_grad):
            # Before the node that adds to `.grad`: a hook of the tensor would run for torch.autograd.grad as well.
            node = torch.autograd.graph.get_gradient_edge(param).node
            node.register_prehook(partial(self._before_accumulation, param))

    def before(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Prepares gradients for an exchange: those to which no backward pass has added since the last exchange."""
        for param, grad in zip(params, grads):
            if param in self._poisoned:
                self._heal(grad)
        self._local.difference_update(params)

    def after(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Poisons the rows that other ranks own of gradients which have been exchanged."""
        poison_remote_rows(grads, self._group.size(), self._group.rank())
        self._poisoned.update(params)

    def check(self, params: Iterable[Tensor]) -> None:
        """Refuses gradients of this rank alone.

        Raises:
            ValueError: If a backward pass has added to one of these gradients and none has exchanged it since.
        """
        refuse_local([p for p in params if p in self._local])

    def _before_accumulation(self, param: Tensor, _: Any) -> None:
        if param in self._poisoned:
            self._poisoned.discard(param)
            if param.grad is not None:
                self._heal(param.grad)
        self._local.add(param)

    @torch.no_grad()
    def _heal(self, grad: Tensor) -> None:
        """Turns a poisoned gradient into this rank's share of the mean."""
        world, rank = self._group.size(), self._group.rank()
        if grad.ndim == 0:  # every rank has the mean, so that each gives its share already
            return
        flat, (start, count) = grad.view(-1), span(grad, world, rank)
        flat[:start].zero_()
        flat[start : start + count].mul_(world)
        flat[start + count :].zero_()


def refuse_local(params: Sequence[Tensor]) -> None:
    """Raises ValueError for parameters whose gradients are of this rank alone; none of them is right."""
    if params:
        raise ValueError(
            f"{len(params)} gradients (the first of shape {tuple(params[0].shape)}) are this rank's alone: their "
            "backward pass ran under no_sync, as in Accelerate's LocalSGD, and under ZeRO-1 each rank would step "
            "its rows by its own samples only; run the last backward pass of a step outside of no_sync, or use "
            "plain DDP (zero_stage=0)"
        )


def refuse_join(model: DistributedDataParallel, _: Any) -> None:
    """Raises ValueError where ranks may take different numbers of steps; a forward pre-hook of DDP."""
    # torch 2.13 (distributed/algorithms/join.py); no public name says whether a model is inside of a Join.
    if model._join_config.enable:
        raise ValueError(
            "the model runs under Join (join_uneven_inputs), where a rank without inputs takes no optimizer step, and "
            "under ZeRO-1 the others need the rows that it owns: give every rank as many batches "
            "(even_batches=True, or drop_last=True), or use plain DDP (zero_stage=0)"
        )
