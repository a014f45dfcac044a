"""A job of a sweep: its folder, its command and its result."""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from . import _log as log
from ._errors import JobFailed
from ._halving import Stop, Stopped
from ._processes import Tree
from ._result import FILE

LOG = "launch.log"
RESUME = "HYDRA_LAUNCHER_RESUME"


@dataclass(eq=False)
class Job:
    """A job of a sweep.

    Its folder has `launch.log`, the output of its processes, and `.launch/` with `job.json`, its identity, written at
    the first start, and `result.pickle`, its return value.

    Attributes:
        number: The index of the job in the sweep.
        overrides: The overrides of the job.
        label: The overrides that the sweep varies.
        folder: The folder of the job.
        result: Hydra's result, which `finish` fills in.
        words: The program and its arguments.
        tree: The processes of the job, once it was started.
        began: The time of the start, of the monotonic clock, in seconds.
        started: The same moment, in seconds since the epoch.
        seconds: The duration of the job, once it has ended.
    """

    number: int
    overrides: list[str]
    label: str
    folder: Path
    result: JobReturn
    words: list[str]
    tree: Tree | None = field(default=None, init=False)
    began: float = field(default=0.0, init=False)
    started: float = field(default=0.0, init=False)
    seconds: float = field(default=0.0, init=False)

    @property
    def log(self) -> Path:
        """The file with the output of the job."""
        return self.folder / LOG

    def identity(self) -> dict[str, Any]:
        """Return what identifies the job: its overrides, and a digest of its composed configuration."""
        text = OmegaConf.to_yaml(self.result.cfg, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return {"overrides": self.overrides, "configuration": digest}

    def begun(self) -> bool:
        """Return whether this job, and not another one with the same folder, was started before."""
        try:
            return bool(json.loads((self._own / "job.json").read_text()) == self.identity())
        except (OSError, ValueError):
            return False

    def done(self) -> bool:
        """Return whether the job was finished before; if so, read its return value."""
        if not self.begun():
            return False
        try:
            value = pickle.loads((self._own / "result.pickle").read_bytes())
        except Exception:  # a file that is missing, broken, or from another version of the program may raise anything
            return False
        self.result.status, self.result.return_value = JobStatus.COMPLETED, value
        return True

    def start(self, launch: list[str], env: dict[str, str], resume: bool, make: Callable[..., Tree]) -> None:
        """Start the job.

        Args:
            launch: The words of `accelerate launch`.
            env: Variables that are added to the environment.
            resume: Whether a job that was interrupted is to resume.
            make: Starts the processes, from the command, variables to add to the environment, and the file for output.
        """
        again = resume and self.begun()
        shutil.rmtree(self._own, ignore_errors=True)
        self._own.mkdir(parents=True)
        (self._own / "job.json").write_text(json.dumps(self.identity(), indent=1) + "\n")
        command = [*launch, *self.words]
        with self.log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n")
        self._wrote = self.log.stat().st_size
        own = {FILE: str(self._own / "result.pickle"), RESUME: "auto" if again else "never"}
        self.began, self.started = time.monotonic(), time.time()
        self.tree = make(command, {**env, **own}, self.log)

    def follow(self, tree: Tree) -> None:
        """Wait for a job that an earlier call of the sweep has started, in place of starting it."""
        self._wrote = 0
        self.began, self.started, self.tree = time.monotonic(), 0.0, tree

    def finish(self, code: int, late: bool = False) -> None:
        """Record the return value of a job that has ended, or the reason of its failure.

        Args:
            code: The exit code of the job.
            late: Whether it was ended at its time limit.
        """
        self._took()
        if code == 0 and not late and self.done():
            return
        (self._own / "result.pickle").unlink(missing_ok=True)
        if late:
            why = "it took longer than hydra.launcher.timeout_minutes"
        elif code == 0:
            why = "it ended, with exit code 0, before its function had returned"
        else:
            why = log.error(self.log, self._wrote)
        self.fail(JobFailed(f"{why} (log: {self.log})"))

    def fail(self, error: JobFailed) -> None:
        """Record that the job has failed."""
        self.result.status, self.result.return_value = JobStatus.FAILED, error

    def stop(self, stop: Stop) -> None:
        """Record that a job was stopped by the sweep, unless it has ended well: it returns its metric."""
        self._took()
        if not self.done():
            value = Stopped(stop.value, stop.step)
            (self._own / "result.pickle").write_bytes(pickle.dumps(value))
            self.result.status, self.result.return_value = JobStatus.COMPLETED, value

    def _took(self) -> None:
        self.seconds = time.monotonic() - self.began

    @property
    def _own(self) -> Path:
        return self.folder / ".launch"
