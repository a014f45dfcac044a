"""Work that ranks do for one another: a result, or an error, is every rank's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class FileError(RuntimeError):
    """A rank could not read or write a file."""


_RAISED = {"value": ValueError, "file": FileError, "other": RuntimeError}


def world() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_all(task: Callable[[], T]) -> list[T]:
    """Does a task on every rank and returns all results; where it fails on one all raise, so that none waits for it.

    A ValueError is raised as one, anything else as a RuntimeError that names the rank: FileError for an OSError.
    """
    mine, failure = _attempt(task)
    every = [mine] * world()
    if dist.is_initialized():
        dist.all_gather_object(every, mine)
    return _results(every, failure)


def on_first(task: Callable[[], T]) -> T:
    """Does a task on rank 0 and returns its result on every rank, or raises there."""
    mine, failure = _attempt(task) if rank() == 0 else (None, None)
    only = [mine]
    if dist.is_initialized():
        dist.broadcast_object_list(only, src=0)
    return _results(only, failure)[0]


def one_after_another(task: Callable[[], T]) -> T:
    """Does a task on rank 0, then on one rank of each machine, then on all; returns this rank's result.

    For work that writes files which those who come later find.
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
