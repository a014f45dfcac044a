"""Tasks whose result, or error, is shared with every rank."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from distopt.failures import FileError

T = TypeVar("T")

_RAISED = {"value": ValueError, "file": FileError, "other": RuntimeError}


def world() -> int:
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the means of tensors over all ranks, which have the same shapes; one all-reduce each."""
    means = [tensor.clone() for tensor in tensors]
    if world() > 1:
        for each in means:
            dist.all_reduce(each)
            each /= world()
    return means


def on_all(task: Callable[[], T]) -> list[T]:
    """Runs a task on every rank. If it fails on one rank, all ranks raise, so that none waits for it.

    Returns:
        The results, by rank.

    Raises:
        ValueError: The task raised ValueError on some rank.
        FileError: The task raised OSError; the message names the rank.
        RuntimeError: The task raised anything else; the message names the rank.
    """
    mine, failure = _attempt(task)
    every = [mine] * world()
    if dist.is_initialized():
        dist.all_gather_object(every, mine)
    return _results(every, failure)


def on_first(task: Callable[[], T]) -> T:
    """Runs a task on rank 0; returns its result, or raises its error as `on_all` does, on every rank."""
    mine, failure = _attempt(task) if rank() == 0 else (None, None)
    only = [mine]
    if dist.is_initialized():
        dist.broadcast_object_list(only, src=0)
    return _results(only, failure)[0]


def gather(thing: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the things of all ranks, by rank, on rank 0; elsewhere an empty list."""
    if not dist.is_initialized():
        return [thing]
    every: list[Any] = [None] * world()
    dist.gather_object(thing, every if rank() == 0 else None, group=group)
    return every if rank() == 0 else []


def scatter(things: list[T]) -> T:
    """Returns this rank's element of a list of rank 0."""
    if not dist.is_initialized():
        return things[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, things if rank() == 0 else None)
    result: T = mine[0]
    return result


def one_after_another(task: Callable[[], T]) -> T:
    """Runs a task on rank 0, then on the first rank of each machine, then on all ranks; returns this rank's result.

    For tasks that write files which later ranks find and reuse. They may take longer than the timeout of collectives:
    the ranks wait outside of any.

    Raises:
        ValueError, FileError, RuntimeError: As `on_all`, on every rank.
    """
    first, local_first = rank() == 0, int(os.environ.get("LOCAL_RANK", "0")) == 0
    results: list[T] = []
    for turn in (first, local_first, True):
        outcome: tuple[Any, Exception | None] = _attempt(task) if turn else ((None, None), None)
        (result, wrong), failure = outcome
        if turn:
            results.append(result)
        _meet()
        every = [(None, wrong)] * world()
        if dist.is_initialized():
            dist.all_gather_object(every, (None, wrong))
        _results(every, failure)
    return results[-1]


def store() -> Any:
    """Returns distopt's part of the store with which the process group was initialized."""
    from torch.distributed.distributed_c10d import _get_default_store  # private, as of torch 2.13

    return dist.PrefixStore("distopt", _get_default_store())


_meetings = itertools.count()


def _meet() -> None:
    """Waits until every rank is here, for as long as it takes; it ends with an error if the store is gone."""
    if world() == 1:
        return
    key, pause = f"meeting/{next(_meetings)}", 0.01
    meeting = store()
    arrived = meeting.add(key, 1)
    while arrived < world():
        time.sleep(pause)
        pause = min(1.5 * pause, 2.0)
        arrived = meeting.add(key, 0)


def _attempt(task: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return (task(), None), None
    except Exception as error:
        if isinstance(error, ValueError):
            return (None, ("value", str(error))), error
        kind = "file" if isinstance(error, (OSError, FileError)) else "other"
        return (None, (kind, f"rank {rank()}: {type(error).__name__}: {error}")), error


def _results(outcomes: list[Any], failure: Exception | None) -> list[Any]:
    for _, wrong in outcomes:
        if wrong:
            raise _RAISED[wrong[0]](wrong[1]) from failure
    return [result for result, _ in outcomes]
