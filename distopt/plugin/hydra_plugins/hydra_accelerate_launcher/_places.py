"""Where the jobs of a sweep run: what a place does, and this machine."""

from __future__ import annotations

import time
from typing import Protocol

from . import _command as command
from . import _devices as devices
from ._config import AccelerateLauncherConf
from ._job import Job
from ._processes import ProcessTree
from ._result import PROCESSES


class Place(Protocol):
    """Starts jobs, as many at the same time as `hydra.launcher.jobs` says."""

    def start(self, job: Job, slot: int) -> str:
        """Start a job in a slot; return what to say of it, or raise JobFailed."""
        ...

    def late(self, job: Job) -> bool:
        """Return whether the time of a job is over, which then has failed."""
        ...


class Here:
    """This machine, or this allocation, whose GPUs are distributed over the slots.

    Args:
        options: The options of the launcher.

    Raises:
        LauncherError: If there are more slots than GPUs.
    """

    def __init__(self, options: AccelerateLauncherConf) -> None:
        self.options = options
        gpus = devices.visible()
        self._slots, self._shared = devices.deal(gpus, options.jobs), bool(gpus) and options.jobs > 1

    def start(self, job: Job, slot: int) -> str:
        """Start the processes of a job with the GPUs of a slot."""
        options, gpus = self.options, self._slots[slot]
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(options.grace_seconds)))}
        if self._shared:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        processes = command.num_processes(options, gpus)
        if processes is not None:
            env[PROCESSES] = str(processes)
        job.start(command.launch(options, gpus), {**env, **options.env}, options.resume, ProcessTree)
        return "started"

    def late(self, job: Job) -> bool:
        """Return whether a job has taken longer than `hydra.launcher.timeout_minutes`."""
        limit = self.options.timeout_minutes
        return limit is not None and time.monotonic() - job.began > 60 * limit
