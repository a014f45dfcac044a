"""The process group of a job, and the store in which its ranks meet."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distopt import collective
from distopt.engine.attempt import agreed_name

if TYPE_CHECKING:
    from accelerate import Accelerator


def join(timeout: datetime.timedelta, backend: str) -> None:
    """Joins the processes that a launcher started, if the environment names them and no group exists.

    Each attempt of a launcher that restarts failed jobs has keys of its own in the store (`agreed_name`): torch 2.13
    gives all attempts the same store (`rendezvous.py` no longer prefixes them), in which the ranks of a restarted job
    would find the addresses of the dead one.

    Args:
        timeout: How long a collective waits for the other ranks.
        backend: As torch's `init_process_group` has it.
    """
    named = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if dist.is_initialized() or not named:
        return
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    own = dist.PrefixStore(f"attempt_{agreed_name(store, rank, world, timeout)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


def accelerator_of(world: int, backend: str, timeout_minutes: float) -> Accelerator:
    """Joins the processes that a launcher started, and returns an `Accelerator` that runs all of them together.

    Args:
        world: The number of processes that were launched.
        backend: As torch's `init_process_group` has it.
        timeout_minutes: How long a collective waits for the other ranks.

    Raises:
        ValueError: If Accelerate does not run all of them together.
    """
    # Imported here: Accelerate takes two seconds, for which refusing a configuration need not wait.
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    timeout = datetime.timedelta(minutes=timeout_minutes)
    join(timeout, backend)
    accelerator = Accelerator(
        cpu=not torch.cuda.device_count(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        project_config=ProjectConfiguration(automatic_checkpoint_naming=False),
    )
    if not dist.is_initialized():  # one process without a launcher: a group of one, so that all code is the same
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Accelerate 1.15 silently runs single processes for some combinations of launcher and device.
    if accelerator.num_processes != world or dist.get_world_size() != world:
        raise ValueError(
            f"{world} processes were launched, Accelerate runs {accelerator.num_processes}: "
            f"use `accelerate launch --multi_gpu --num_processes {world}`, on CPUs too"
        )
    return accelerator


def connect() -> dist.Store | None:
    """Returns a connection of its own to the store of this job, for another thread; None for one process."""
    return None if collective.world() == 1 else dist.PrefixStore("watchdog", collective.store().clone())
