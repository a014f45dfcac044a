"""One job of a sweep: its folder, what is to be done in it, what came of that."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from . import log
from .errors import JobFailed
from .processes import ProcessTree
from .result import FILE

LOG = "launch.log"
RESUME = "HYDRA_LAUNCHER_RESUME"


@dataclass(eq=False)
class Job:
    """A job of a sweep.

    In its folder are `launch.log`, with all that its processes write, and `.launch/`: `job.json`, from its first start
    on, says what the job is, and `result.pickle` holds what it returned.
    """

    number: int
    overrides: list[str]
    label: str  # the overrides that the sweep varies
    folder: Path
    result: JobReturn  # filled in by `finish`
    words: list[str]  # the program and its arguments
    tree: ProcessTree | None = field(default=None, init=False)
    began: float = field(default=0.0, init=False)
    seconds: float = field(default=0.0, init=False)

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def identity(self) -> dict[str, Any]:
        """What is the same for the same job: the overrides, and the configuration that they make with the files."""
        text = OmegaConf.to_yaml(self.result.cfg, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return {"overrides": self.overrides, "configuration": digest}

    def begun(self) -> bool:
        """Whether this job, and not another one of this folder, was started before."""
        try:
            return bool(json.loads((self._own / "job.json").read_text()) == self.identity())
        except (OSError, ValueError):
            return False

    def done(self) -> bool:
        """Whether it was finished before; then its return value is there."""
        if not self.begun():
            return False
        try:
            value = pickle.loads((self._own / "result.pickle").read_bytes())
        except Exception:  # whatever a file that is not there, broken, or of another version of the program may raise
            return False
        self.result.status, self.result.return_value = JobStatus.COMPLETED, value
        return True

    def start(self, launch: list[str], env: dict[str, str], resume: bool) -> None:
        """Starts it under `accelerate launch`, whose words are given."""
        again = resume and self.begun()
        shutil.rmtree(self._own, ignore_errors=True)
        self._own.mkdir(parents=True)
        (self._own / "job.json").write_text(json.dumps(self.identity(), indent=1) + "\n")
        command = [*launch, *self.words]
        self._wrote = self.log.stat().st_size if self.log.is_file() else 0
        with self.log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n")
        own = {FILE: str(self._own / "result.pickle"), RESUME: "auto" if again else "never"}
        self.began = time.monotonic()
        self.tree = ProcessTree(command, {**os.environ, **env, **own}, self.log)

    def finish(self, code: int, late: bool = False) -> None:
        """Notes what a job that has ended returned, or why it failed."""
        self.seconds = time.monotonic() - self.began
        if code == 0 and not late and self.done():
            return
        (self._own / "result.pickle").unlink(missing_ok=True)
        if late:
            why = "it took longer than hydra.launcher.timeout_minutes"
        elif code == 0:
            why = "it ended, with exit code 0, before its function had returned"
        else:
            why = log.error(self.log, self._wrote + 1)
        self.result.status, self.result.return_value = JobStatus.FAILED, JobFailed(f"{why} (log: {self.log})")

    @property
    def _own(self) -> Path:
        return self.folder / ".launch"
