"""The callback inside a job, which passes the return value of its first process to the launcher."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ._processes import die_with_parent

FILE, PROCESSES = "HYDRA_LAUNCHER_RESULT", "HYDRA_LAUNCHER_PROCESSES"


class Result(Callback):
    """A Hydra callback that the launcher adds to the configuration of every job."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with one line unless the requested number of processes was started; exit when the parent dies."""
        die_with_parent(signal.SIGTERM)
        wanted, got = os.environ.get(PROCESSES), os.environ.get("WORLD_SIZE", "1")
        if wanted is not None and wanted != got:
            # Accelerate 1.15 starts a single one for some configurations, silently. Hydra lets no exception through.
            sys.stderr.write(f"hydra/launcher=accelerate: error: {wanted} processes were requested, {got} started\n")
            sys.exit(1)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the return value atomically: if the file exists, the job is done."""
        file = os.environ.get(FILE)
        if file and int(os.environ.get("RANK", "0")) == 0 and job_return.status == JobStatus.COMPLETED:
            try:
                value = pickle.dumps(job_return.return_value)
            except Exception as error:
                sys.stderr.write(f"hydra/launcher=accelerate: error: the return value cannot be pickled: {error}\n")
                sys.exit(1)
            half = Path(file).with_suffix(".tmp")
            half.write_bytes(value)
            half.replace(file)
