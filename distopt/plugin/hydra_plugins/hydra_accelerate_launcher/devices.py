"""Which GPUs there are, and which of them each job gets."""

from __future__ import annotations

import os

from .errors import LauncherError


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    import torch  # takes a second, which composing a configuration need not wait

    return [str(number) for number in range(torch.cuda.device_count())]


def deal(gpus: list[str], jobs: int) -> list[list[str]]:
    """The same number of neighbouring GPUs for each of the jobs that run side by side; nothing where there are none."""
    if gpus and jobs > len(gpus):
        raise LauncherError(f"hydra.launcher.jobs={jobs}, but there are {len(gpus)} GPUs: at most one job for each")
    share = len(gpus) // jobs
    return [gpus[slot * share : (slot + 1) * share] for slot in range(jobs)]
