"""An object on every rank of a pool, and functions that run once on new ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ranks import IMPORTED_ONCE, RankError, Ranks, RankSetup


class TeamError(RuntimeError):
    """The reason, in one line, why a team could not do something."""


class Team(Ranks):
    """A pool with an object on every rank, whose methods are called on all ranks at the same time.

    A rank that raises, dies or does not answer in time ends its team.

    Args:
        world: The number of ranks.
        make: `make(device, *args)` makes the object of a rank; a function or a class of a module.
        args: Its arguments, which are pickled.
        seconds: The time limit of making the objects, and of each call.

    Raises:
        TeamError: If a rank could not make its object, as in `call`.
    """

    def __init__(self, world: int, make: Callable[..., Any], *args: Any, seconds: float = 300.0) -> None:
        setup = RankSetup(imports=[make.__module__, *IMPORTED_ONCE], gpu=torch.cuda.is_available())
        super().__init__(world, seconds, setup)
        self._run_or_stop("start", _make_member, make, args)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call this method on all ranks; returns the results, by rank."""
        return self._run_or_stop(name, _call_member, name, args)

    def _run_or_stop(self, name: str, function: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return self.run(function, *args, name=name)
        except (RankError, TimeoutError) as error:
            self.stop()
            raise TeamError(error.reason if isinstance(error, RankError) else str(error)) from None


def spawn(world: int, function: Callable[..., None], *args: Any) -> None:
    """Run `function(device, *args)` once on `world` new ranks: one per GPU over nccl, or CPU processes over gloo."""
    setup = RankSetup(imports=[function.__module__, *IMPORTED_ONCE], gpu=torch.cuda.is_available(), keeps_stdout=True)
    ranks = Ranks(world, 24 * 3600.0, setup)
    try:
        ranks.run(_with_device, function, args)
    finally:
        ranks.stop()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _with_device(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(_device(), *args)


_member: Any = None  # the object of this rank, in a team


def _make_member(make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _member
    _member = make(_device(), *args)


def _call_member(name: str, args: tuple[Any, ...]) -> Any:
    return getattr(_member, name)(*args)
