"""The training job under torchrun's own agent, whose workers are forked from what has imported everything."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.harness import jobs
from tests.harness.forkserver import context


class Launched:
    """A launcher that runs a job with two ranks; it is a process of its own, whose children are the ranks.

    Torchrun starts each worker anew, which costs 5 seconds of CPU; here its agent forks them, as it can. It
    sees their deaths, but not that they have ended well, which it wants to hear by the result of a function.

    Args:
        cwd: The folder in which the job runs.
        words: Its command line.
        restarts: How often the agent starts the job again.
    """

    def __init__(self, cwd: Path, words: Sequence[str], restarts: int = 0) -> None:
        self.logs = cwd / "logs" / str(time.monotonic_ns())
        self.logs.mkdir(parents=True)
        self.process: BaseProcess = context.Process(target=_launch, args=(cwd, words, restarts, self.logs))
        self.process.start()
        self._seen: dict[int, psutil.Process] = {}

    def ranks(self) -> list[psutil.Process]:
        """Returns the living ranks, by their ranks, as far as the agent has started them."""
        for pid in jobs.children(self.process.pid or 0):
            try:
                self._seen.setdefault(pid, psutil.Process(pid))
            except psutil.NoSuchProcess:
                continue
        return [each for each in self._seen.values() if running(each)]

    def strike(self, launcher: bool, *numbers: int) -> None:
        """SIGKILL to the launcher, if wanted, then to these ranks."""
        ranks = self.ranks()  # now: without their launcher nobody knows them
        if launcher:
            self.process.kill()
        for number in numbers:
            ranks[number].kill()

    def wait(self, seconds: float) -> int | None:
        """Waits for the launcher and every rank that it had; AssertionError, and nothing left, if one does not end."""
        deadline = time.monotonic() + seconds * jobs.PATIENCE
        while (self.process.is_alive() or self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.01)
        late = [*self.ranks(), *([self.process] if self.process.is_alive() else [])]
        for rank in self.ranks():
            rank.send_signal(signal.SIGABRT)  # it writes where it is
            with contextlib.suppress(psutil.TimeoutExpired):
                rank.wait(5)
        self.kill()
        assert not late, f"{late} did not end within {seconds} s: {self.told()}"
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL to the launcher and all ranks."""
        if self.process.is_alive():
            self.process.kill()
        for rank in self.ranks():
            rank.kill()
        self.process.join()

    def told(self) -> str:
        """Returns what the launcher and the ranks have written."""
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in sorted(self.logs.glob("*.*")))


def running(process: psutil.Process) -> bool:
    """Whether a process is there, and not only its exit code, for which nobody may ask."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _launch(cwd: Path, words: Sequence[str], restarts: int, logs: Path) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _write_to(logs / "launcher.log")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=logs.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(str(logs / "torch")),
    )
    elastic_launch(config, _rank)(cwd, words, logs)


def _rank(cwd: Path, words: Sequence[str], logs: Path) -> None:
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    _write_to(logs / f"{attempt}-{rank}.log")
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # a new program would not have the agent's
        signal.signal(number, signal.SIG_DFL)
    os.chdir(cwd)
    sys.argv = ["distopt.train", *words]
    from distopt.train import main

    main()


def _write_to(file: Path) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(handle, number)
