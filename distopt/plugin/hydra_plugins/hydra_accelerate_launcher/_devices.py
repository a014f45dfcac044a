"""The visible GPUs, and their distribution over jobs."""

from __future__ import annotations

import os

from ._errors import LauncherError


def visible() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    import torch  # here, since it takes a second, which composing a configuration does not need

    return [str(index) for index in range(torch.cuda.device_count())]


def deal(gpus: list[str], jobs: int) -> list[list[str]]:
    """Return the GPUs of each of the jobs that run at the same time: equally many neighbours, or none without GPUs.

    Raises:
        LauncherError: If there are more jobs than GPUs.
    """
    if gpus and jobs > len(gpus):
        raise LauncherError(f"hydra.launcher.jobs={jobs}, but there are {len(gpus)} GPUs: at most one job for each")
    share = len(gpus) // jobs
    return [gpus[slot * share : (slot + 1) * share] for slot in range(jobs)]
