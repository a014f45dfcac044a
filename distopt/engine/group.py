"""The process group of a job, and the store in which its ranks meet."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from distopt import collective
from distopt.failures import attempt


def join(timeout: datetime.timedelta, backend: str) -> None:
    """Joins the processes that a launcher started, if the environment names them and no group exists.

    Each attempt of a launcher that restarts failed jobs has keys of its own in the store: torch 2.13 gives all
    attempts the same store (`rendezvous.py` no longer prefixes them), in which the ranks of a restarted job would find
    the addresses of the dead one.

    Args:
        timeout: How long a collective waits for the other ranks.
        backend: As torch's `init_process_group` has it.
    """
    named = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if dist.is_initialized() or not named:
        return
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    own = dist.PrefixStore(f"attempt_{attempt()}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


def connect() -> dist.Store | None:
    """Returns a connection of its own to the store of this job, for another thread; None for one process."""
    return None if collective.world() == 1 else dist.PrefixStore("watchdog", collective.store().clone())
