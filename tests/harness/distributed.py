"""Real ranks for the tests: a pool of processes over gloo for each world size, started once and kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from benchmarks.ranks import RankError, Ranks, RankSetup
from tests.harness.forkserver import without_preemption

__all__ = ["RankError", "run", "stop_all"]

_SECONDS = float(os.environ.get("DISTOPT_TEST_SECONDS", "120"))  # more, where other programs use the machine
_new_group, NON_MEMBER = dist.new_group, dist.GroupMember.NON_GROUP_MEMBER
_groups: dict[str, Any] = {}
_linear = torch.nn.functional.linear
_pools: dict[int, Ranks] = {}


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on each of `world` ranks; returns the results, by rank.

    Raises:
        RankError: If a rank raised or died.
        TimeoutError: If a rank did not answer within `DISTOPT_TEST_SECONDS`, by default two minutes.
    """
    if world not in _pools or not _pools[world].alive:
        _pools[world] = Ranks(
            world, _SECONDS, RankSetup(imports=(), threads=1, keeps_stdout=True, before=_before, after=_after)
        )
    return _pools[world].run(function, *args)


def stop_all() -> None:
    """End the processes of all pools."""
    for ranks in _pools.values():
        ranks.stop()
    _pools.clear()


def _before() -> None:
    without_preemption()
    warnings.simplefilter("error")
    if dist.new_group is not _shared_group:
        dist.new_group = device_mesh.new_group = _shared_group


def _shared_group(ranks: Sequence[int] | None = None, timeout: Any = None, *args: Any, **kwargs: Any) -> Any:
    """As torch's `new_group`, but gives an equal group that is there already.

    Each gloo group has threads that wake up a hundred times a second, and no test destroys its own: a rank had 700 of
    them in the end, which took two thirds of the machine.
    """
    key = repr((ranks and [*ranks], timeout, args, sorted((k, v) for k, v in kwargs.items() if k != "group_desc")))
    if _groups.get(key) not in distributed_c10d._world.pg_map and _groups.get(key) is not NON_MEMBER:
        _groups[key] = _new_group(ranks, timeout, *args, **kwargs)
    return _groups[key]


def _after() -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    torch.nn.functional.linear = _linear  # DeepSpeed's stage 3 replaces it in the process by one that rounds otherwise
    unset_hf_deepspeed_config()  # Accelerate sets it, and at stage 3 transformers partitions every later model
