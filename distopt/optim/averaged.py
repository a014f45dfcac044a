"""The weights to evaluate and to export: those of training, or their average."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distopt.layout import ShardLayout, local, unwrap_optimizer
from distopt.layout.fsdp2 import reshard

# What averages keep in the param groups: how many weights are in them. A checkpoint has it beside the lr.
GROUP_STATE = ("ema_weight", "lawa_snapshots", "lawa_steps", "lawa_window")
_BUFFER = re.compile(r"ema|lawa_\d+")

Averages = tuple[list[Tensor], list[Tensor]]  # parameters, and the average of each of their shards


class Average(Protocol):
    """What averages the weights of an optimizer: `EMA`, `LAWA`, or a schedule-free optimizer itself."""

    def averages(self, index: int) -> Averages:
        """Returns the parameters of a param group whose weights are not their average, and the average of each of their
        shards, in the order of `ShardLayout.weights`."""


def is_average(buffer: str) -> bool:
    """Returns whether a buffer of an optimizer's state belongs to an average of the weights."""
    return _BUFFER.fullmatch(buffer) is not None


def filled(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the buffers whose mean is the average of a param group, also of one in a checkpoint."""
    if group.get("ema_weight"):
        return ("ema",)
    return tuple(f"lawa_{i}" for i in range(min(group.get("lawa_snapshots", 0), group.get("lawa_window", 0))))


def mean(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the mean of several lists of tensors, element by element; of one list that list itself."""
    first, *others = columns
    if not others or not first:
        return list(first)
    total = [t.clone() for t in first]
    for column in others:
        torch._foreach_add_(total, list(column))
    torch._foreach_div_(total, float(len(columns)))
    return total


def params_with(optimizer: Any, index: int, buffer: str) -> list[Tensor]:
    """Returns the parameters of a param group whose state has a buffer, also those that were frozen since."""
    layout, params = optimizer.layout, optimizer.param_groups[index]["params"]
    every = dict.fromkeys([*layout.local_params(index, params), *params])
    return [p for p in every if p in layout and buffer in optimizer.state.get(p, ())]


def average_of(optimizer: torch.optim.Optimizer) -> Average | None:
    """Returns what averages the weights of an optimizer, also inside of a wrapper; None without an average."""
    average: Average | None = getattr(unwrap_optimizer(optimizer), "average", None)
    return average


def update_average(optimizer: torch.optim.Optimizer) -> None:
    """Takes the weights of now into the average of an optimizer, if it has one beside its own steps."""
    getattr(average_of(optimizer), "update", lambda: None)()


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[None]:
    """Gives a model the average of its weights for the time of the block; every rank has to enter it.

        with distopt.averaged(optimizer, model):
            evaluate(model)

    That of `EMA` or `LAWA`, or a schedule-free optimizer's own; without one the weights stay. Afterwards, also after an
    exception, the weights are the same bits as before. Buffers of the model (batch norm's statistics) are not averaged.
    Takes a copy of this rank's weights; communication only where ranks have copies of updated shards (ZeRO-1).

    Args:
        optimizer: The optimizer; a step inside of the block would be of the average.
        model: The model, wrapped or not.
    """
    inner, average = unwrap_optimizer(optimizer), average_of(optimizer)
    if average is None:
        yield
        return
    layout: ShardLayout = inner.layout
    kept: list[tuple[Tensor, Tensor]] = []
    changed: list[Tensor] = []
    try:
        with torch.no_grad():
            for index in range(len(inner.param_groups)):
                params, values = average.averages(index)
                kept += [(own, own.clone()) for own in (local(p.detach()) for p in params)]
                changed += params
                for shard, value in zip(layout.weights(params), values, strict=True):
                    shard.copy_(value)
            if changed:
                layout.publish(changed)
        reshard(model)
        yield
    finally:
        with torch.no_grad():
            layout.sync.wait()
            for own, copy in kept:
                own.copy_(copy)
            if layout.flat and changed:  # the weights that the model computes with are copies of the partitions
                layout.publish(changed)
        reshard(model)
