"""SLURM as the place of jobs: each is submitted, looked for in the queue, and cancelled by its own number."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import _command as command
from ._config import SlurmLauncherConf
from ._errors import JobFailed, LauncherError
from ._job import Job
from ._result import PROCESSES
from ._slurm_script import script

ID, EXIT, SCRIPT = "slurm.json", "exit", "job.sh"
# What squeue says of a job that has ended. After PREEMPTED and NODE_FAIL it may go into the queue again; SLURM forgets
# a job some minutes after its end.
_ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "REVOKED"}
_SECONDS = 60.0  # for a command of SLURM


class Queue:
    """The states of this user's jobs, by number, as squeue tells them.

    Args:
        seconds: The time after which it is asked again.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._states: dict[str, str] = {}
        self._asked = -float("inf")

    def state(self, number: str, now: bool = False) -> str:
        """Return the state of a job, as PENDING; empty if SLURM does not know it any more.

        Args:
            number: Its number.
            now: Whether to ask again, unless that was done just now.
        """
        if time.monotonic() - self._asked > (min(self.seconds, 0.5) if now else self.seconds):
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # it is overloaded: nothing is known anew
                words = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T"]
                told = subprocess.run(words, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
                rows = [line.strip().partition("|") for line in told.splitlines()]
                self._states = {found: state for found, _, state in rows}
            self._asked = time.monotonic()
        return self._states.get(number, "")

    def submitted(self, number: str) -> None:
        """Note a job that was submitted since squeue was asked."""
        self._states[number] = "PENDING"


class SlurmJob:
    """A job in SLURM's queue, in place of a tree of processes.

    Args:
        number: Its number.
        queue: The queue.
        exits: The file to which the script of the job writes its exit code.
    """

    def __init__(self, number: str, queue: Queue, exits: Path) -> None:
        self.number, self.queue, self.exits = number, queue, exits

    def poll(self) -> int | None:
        """Return the exit code of the job, 1 if it did not come to its end; None while it waits or runs."""
        if self.alive:
            return None
        with contextlib.suppress(OSError, ValueError):
            os.listdir(self.exits.parent)  # so that a network's file system looks again
            return int(self.exits.read_text())
        return 1

    @property
    def alive(self) -> bool:
        """Whether the job waits or runs."""
        state = self.queue.state(self.number)
        return bool(state) and state not in _ENDED

    def terminate(self) -> None:
        """Have a running job end after it has saved; a waiting one is cancelled."""
        running = self.queue.state(self.number, now=True) in ("RUNNING", "COMPLETING")
        _scancel("--signal=TERM", self.number) if running else _scancel(self.number)
        self.queue.seconds = min(self.queue.seconds, 1.0)  # somebody waits for it

    def kill(self) -> None:
        """Cancel the job."""
        _scancel(self.number)


class Slurm:
    """A SLURM cluster.

    Args:
        options: The options of the launcher.

    Raises:
        LauncherError: If SLURM is not there.
    """

    def __init__(self, options: SlurmLauncherConf) -> None:
        for name in ("sbatch", "squeue", "scancel"):
            if shutil.which(name) is None:
                raise LauncherError(
                    f"hydra/launcher=accelerate_slurm: there is no command {name}; start the sweep on a machine of the "
                    "cluster, or on this one by hydra/launcher=accelerate"
                )
        self.options, self.queue = options, Queue(options.poll_seconds)

    def start(self, job: Job, slot: int) -> str:
        """Submit a job, unless it is in the queue since an earlier call of the sweep.

        Raises:
            JobFailed: If an earlier job of another configuration runs in the same folder, or SLURM refuses the job.
        """
        options, own = self.options, job.folder / ".launch"
        known = _number(own / ID)
        if known and (state := self.queue.state(known, now=True)) and state not in _ENDED:
            if not (options.resume and job.begun()):
                raise JobFailed(f"an earlier job runs in {job.folder}: scancel {known}, and give the command again")
            job.follow(SlurmJob(known, self.queue, own / EXIT))
            return f"is SLURM job {known}"

        def submit(words: Sequence[str], env: Mapping[str, str], log: Path) -> SlurmJob:
            return self._submit(job, words, env, log)

        processes = processes_of(options)
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(options.grace_seconds))), PROCESSES: str(processes)}
        job.start(command.launch_on_nodes(options, processes), {**env, **options.env}, options.resume, submit)
        return f"submitted as SLURM job {_number(own / ID)}"

    def late(self, job: Job) -> bool:
        """SLURM has its own limit."""
        return False

    def _submit(self, job: Job, words: Sequence[str], env: Mapping[str, str], log: Path) -> SlurmJob:
        own = job.folder / ".launch"
        file = own / SCRIPT
        file.write_text(script(self.options, words, env, own / EXIT))
        command_ = ["sbatch", "--parsable", *sbatch_words(self.options, log), str(file)]
        # In an allocation, its own size must not become that of the job.
        clean = {name: value for name, value in os.environ.items() if not _of_allocation(name)}
        try:
            told = subprocess.run(
                command_, check=True, capture_output=True, text=True, env=clean, timeout=_SECONDS
            ).stdout
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise JobFailed(f"SLURM refuses the job: {said}") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise JobFailed(f"sbatch did not answer: {error}") from None
        number = told.strip().splitlines()[-1].partition(";")[0]
        (own / ID).write_text(json.dumps({"id": number}) + "\n")
        self.queue.submitted(number)
        return SlurmJob(number, self.queue, own / EXIT)


def processes_of(options: SlurmLauncherConf) -> int:
    """Return the number of processes of a job, on all its nodes."""
    return options.nodes * (options.processes_per_node or options.gpus_per_node or 1)


def sbatch_words(options: SlurmLauncherConf, log: Path) -> list[str]:
    """Return the options of sbatch; no shell reads them."""
    given = {
        "job-name": options.name,
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "mem": None if options.mem_gb is None else f"{round(1024 * options.mem_gb)}M",
        "time": options.timeout_min,
        "signal": f"B:USR1@{options.signal_delay_s}" if options.requeue else None,
        "requeue" if options.requeue else "no-requeue": True,
        "partition": options.partition,
        "qos": options.qos,
        "account": options.account,
        "constraint": options.constraint,
        **options.additional_parameters,
    }
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None and value is not False
    ]


def _number(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _of_allocation(name: str) -> bool:
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF"


def _scancel(*words: str) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # it has ended by now, or SLURM does not answer
        subprocess.run(["scancel", *words], check=False, capture_output=True, timeout=_SECONDS)
