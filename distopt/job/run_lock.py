"""The lock of a run's folder: one job at a time writes there."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

import filelock

from distopt import collective
from distopt.failures import attempt

_OWNER = ".owner.json"
_DYING = 3.0  # seconds that a process which was killed may still hold what it had locked


class RunLock:
    """A job's claim to a run's folder, which ends with the process that holds it, however that ends.

    The lock is one of the operating system on `.lock`; `.owner.json` says who holds it, for the message to others. A
    holder that was killed a moment ago, by a supervisor that restarts the job, is given time to end.

    Args:
        folder: The run's folder; made if there is none.
        restarts: How often a launcher has restarted this job.

    Attributes:
        note: A line about an owner that has ended unfinished, and whose place this job takes; "" for none.
        restarted: Whether that owner was an earlier attempt of the same launch, which had opened the run.

    Raises:
        ValueError: If another job holds the folder, with its host, process, SLURM job and start.
    """

    def __init__(self, folder: Path, restarts: int = 0) -> None:
        self._file = folder / _OWNER
        self._lock = filelock.FileLock(folder / ".lock")
        folder.mkdir(parents=True, exist_ok=True)
        self.note, self.restarted = "", False
        try:
            self._lock.acquire(timeout=_DYING)
        except filelock.Timeout:
            raise ValueError(
                f"{folder} belongs to a job that is running, {_told(_read(self._file))}: "
                "wait until it has ended, or choose another name"
            ) from None
        except OSError as error:  # a file system without locks
            self.note = f"nothing keeps another job out of {folder}: its file system has no locks ({error})"
        before = _read(self._file)
        if before.get("opened") and not self.note:
            self.note = f"{folder} is taken over from a job that ended unfinished, {_told(before)}"
        self.restarted = restarts > 0 and bool(before.get("opened")) and before.get("launch") == _launch()
        self._write(opened=False)

    def opened(self) -> None:
        """Notes that the folder is that of this job's run, which an automatic restart resumes."""
        self._write(opened=True)

    def release(self) -> None:
        """Gives the folder to whoever wants it next."""
        self._file.unlink(missing_ok=True)
        self._lock.release()

    def _write(self, opened: bool) -> None:
        owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "launch": _launch(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "opened": opened,
        }
        self._file.write_text(json.dumps(owner) + "\n")


def claim(folder: Path) -> tuple[RunLock | None, bool, list[str]]:
    """Claims a run's folder for this job; every rank has to call it, and rank 0 holds the lock.

    Returns:
        The lock, on rank 0; whether the run is one that this launcher has restarted; and lines for the user.

    Raises:
        ValueError: On every rank, if another job holds the folder.
    """
    held: list[RunLock] = []
    restarts = max(collective.on_all(attempt))  # a launcher may count none where that of another machine does

    def lock() -> tuple[bool, list[str]]:
        held.append(RunLock(folder, restarts))
        return held[0].restarted, [held[0].note] if held[0].note else []

    restarted, notes = collective.on_first(lock)
    return (held[0] if held else None), restarted, notes


def is_mine(lock: Path) -> bool:
    """Whether this process has made the file of a lock, and still holds it."""
    owner = _read(lock.with_name(_OWNER))
    return (owner.get("host"), owner.get("process")) == (socket.gethostname(), os.getpid())


def _launch() -> str | None:
    """Returns the name that torch's launchers of this job have in common; None without one."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(file.read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def _told(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return f"process {owner.get('process', '?')} on {owner.get('host', '?')}{job}, since {owner.get('since', '?')}"
