"""The proof: three small messages that show whether every rank has the shards that its layout describes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.layout import unwrap_optimizer
from distopt.proof.claims import WHETHER, Claims, claims
from distopt.proof.content import balanced, number_of, signed
from distopt.proof.healing import Drift
from distopt.proof.meeting import meet
from distopt.proof.verdict import difference, wrong_layer

_NUMBERS = 16  # the length of the first message
_MARK = 0x70726F7665  # so that the message of another collective is not mistaken for ours


class NoGradients(ValueError):
    """No parameter has a gradient on any rank, so that a step would change nothing."""


@torch.no_grad()
def prove(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    state: bool = False,
    gradients: bool = True,
    group: dist.ProcessGroup | None = None,
) -> list[str]:
    """Proves that every rank has the shards that the layout of the optimizer describes.

    Every rank must call it, between the backward pass and the step. It sends three small messages: 16 numbers over all
    ranks, a few numbers per parameter over each sharded mesh axis, and as many over all ranks. The answer is read back
    to the host, which waits for the device.

    Args:
        optimizer: Any torch optimizer, also inside `SAM` or Accelerate's wrapper, whose layout is bound or can be
            inferred from its parameters (replicated ones and DTensors).
        model: The model, for parameter names in errors. It also reveals parameters that the optimizer lacks, which
            cause a warning, and gradients that FSDP2 never reduced.
        state: Include the state of the optimizer and master weights.
        gradients: Include the gradients. DeepSpeed's are never included, since it passes them one partition at a time.
        group: The ranks that train together. None means the ranks of DDP's group under ZeRO-1, and otherwise all.

    Returns:
        The names of the parameters that have no gradient on any rank.

    Raises:
        ValueError: If ranks differ; with the same message on all of them, which names the parameter and the ranks.
    """
    optimizer = unwrap_optimizer(optimizer)
    several = dist.is_available() and dist.is_initialized()
    group = group or getattr(optimizer.__dict__.get("_bound"), "replicas", None)
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD)) if several else (0,)
    if several and dist.get_rank() not in ranks:
        raise ValueError(f"rank {dist.get_rank()} is not in the group {list(ranks)} that it is to prove with")
    own = claims(optimizer, model, state, gradients, ranks)
    if len(ranks) == 1:
        if own.fault:
            raise ValueError(own.fault) from own.error
        table = torch.stack([column.shares for column in own.columns])
    else:
        meet(ranks, f"step {_step(own)} of {type(optimizer).__name__}")
        _first(own, ranks, group)
        _third(own, table := _second(own), ranks, group)
    if own.unclaimed:
        warnings.warn(
            f"{len(own.unclaimed)} trainable parameters of the model are not in the optimizer, the first is "
            f"{own.unclaimed[0]}: nothing moves them, unless another optimizer does",
            UserWarning,
            stacklevel=2,
        )
    return _without_gradient(own, table, type(optimizer).__name__)


def _without_gradient(own: Claims, table: Tensor, optimizer: str) -> list[str]:
    """Returns the names of the parameters without a gradient on any rank; raises NoGradients if none has one.

    Args:
        own: The claims of this rank.
        table: The columns, summed over their groups.
        optimizer: The class name of the optimizer.
    """
    whats = [column.what for column in own.columns]
    if WHETHER not in whats:
        return []
    counts = table[whats.index(WHETHER)].tolist()  # the same on all ranks
    without = [name for (name, *_), count in zip(own.layers, counts) if not count]
    if without and len(without) == len(own.layers):
        raise NoGradients(
            f"no parameter of {optimizer} has a gradient on any rank, the first is {without[0]}: there "
            "was no backward pass, or these are not the parameters that the model trains; make the optimizer after the "
            "model is wrapped or sharded, and before its first forward pass"
        )
    return without


def _first(own: Claims, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
    """Checks that all ranks are about to send the same messages over the same groups, so that none of them can hang.

    The message has a fixed size, so that ranks that differ can take part. Its sum is 0 if they agree, so that all ranks
    come to the same conclusion.
    """
    rank = dist.get_rank()
    members = sum(balanced(g.index(rank), len(g)) * number_of((k, g)) for k, g in enumerate(own.groups))
    equal = [_MARK, len(own.layers), len(own.groups), *(number_of(value) for value in own.plain.values())]
    factor = balanced(ranks.index(rank), len(ranks))
    numbers = [int(bool(own.fault)), signed(members), *(signed(factor * number) for number in equal)]
    total = torch.tensor(numbers + [0] * (_NUMBERS - len(numbers)), device=_device(group))
    dist.all_reduce(total, group=group)
    if total.any():
        raise ValueError(difference(ranks, _gathered((own.fault, own.groups, own.plain), ranks, group))) from own.error


def _second(own: Claims) -> Tensor:
    """Returns the columns, each summed over the groups that shard its tensors."""
    table = torch.stack([column.shares for column in own.columns])
    for groups in dict.fromkeys(column.groups for column in own.columns):
        index = [i for i, column in enumerate(own.columns) if column.groups == groups]
        shares = table[index]
        for each in groups:
            dist.all_reduce(shares, group=each)
        table[index] = shares
    return table


def _third(own: Claims, table: Tensor, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
    """Checks that the columns are equal on all ranks, that coverage is complete, and that replicas are equal."""
    table = table.to(_device(group))
    table[0] -= torch.tensor(own.full, dtype=torch.int64, device=table.device)
    rank = dist.get_rank()
    same = balanced(ranks.index(rank), len(ranks))
    total = torch.stack(
        [row * (number_of(rank) | 1 if column.zero else same) for column, row in zip(own.columns, table)]
    )
    dist.all_reduce(total, group=group)
    if total.any():
        tables = torch.stack(_gathered(table.cpu(), ranks, group))
        raise Drift(wrong_layer(ranks, own, tables), ranks, own, tables)


def _gathered(thing: Any, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> list[Any]:
    every: list[Any] = [None] * len(ranks)
    dist.all_gather_object(every, thing, group=group)
    return every


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Returns a device type that the group communicates from, the same on every rank."""
    # As torch 2.13's all_gather_object asks, by a property that is not documented.
    types = [device.type for device in (group or dist.group.WORLD)._device_types]  # type: ignore[union-attr]
    if "cpu" in types:
        return torch.device("cpu")
    return torch.device(types[0], torch.accelerator.current_device_index())


def _step(own: Claims) -> str:
    counts = [step for step in own.steps if step is not None]
    return f"{int(max(counts, default=0)) + 1}"
