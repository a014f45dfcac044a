"""Tasks whose result, or error, is shared with every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class FileError(RuntimeError):
    """An error of a rank that could not read or write a file."""


class LostRank(RuntimeError):
    """An error of a rank that waits for another one which does not come."""


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


def one_after_another(task: Callable[[], T]) -> T:
    """Runs a task on rank 0, then on the first rank of each machine, then on all ranks; returns this rank's result.

    For tasks that write files which later ranks find and reuse.
    """
    first, local_first = rank() == 0, int(os.environ.get("LOCAL_RANK", "0")) == 0
    results: list[T] = []
    for turn in (first, local_first, True):
        on_all(lambda turn=turn: results.append(task()) if turn else None)  # type: ignore[misc]
    return results[-1]


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
