"""Trees of processes: a command that is started and ended together with its descendants."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tree(Protocol):
    """What runs of a job, here or elsewhere."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        ...

    @property
    def alive(self) -> bool:
        """Whether any of it still runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


class ProcessTree:
    """A command and its descendants in any process group; torchrun's workers have groups of their own.

    The command receives SIGTERM when this process dies for any reason.

    Args:
        command: The command.
        env: Variables that are added to its environment.
        log: The file to which its output is appended.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as out:
            self.root = subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal goes to the sweep alone, which then ends its jobs
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        self._descendants: set[Any] = set()
        self._looked = 0.0

    def poll(self) -> int | None:
        """Return the exit code of the command, negative for a signal; None while it runs."""
        if time.monotonic() - self._looked > 1.0:
            self._look()
        return self.root.poll()

    @property
    def alive(self) -> bool:
        """Whether any process of the tree still runs."""
        self._look()
        return self.root.poll() is None or any(_runs(process) for process in self._descendants)

    def terminate(self) -> None:
        """Send SIGTERM to the process group of the command, or to its descendants if the command has ended."""
        self._look()
        if self.root.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.root.pid, signal.SIGTERM)
        else:
            self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the tree."""
        self._look()
        if self.root.poll() is None:
            self.root.kill()
        self._send(signal.SIGKILL)
        self.root.wait()

    def _look(self) -> None:
        import psutil  # a requirement of Accelerate

        self._looked = time.monotonic()
        with contextlib.suppress(psutil.Error):
            # The id of a process that was waited for may belong to another one by now.
            root = [psutil.Process(self.root.pid)] if self.root.returncode is None else []
            for process in [*root, *filter(_runs, self._descendants)]:
                with contextlib.suppress(psutil.Error):
                    self._descendants.update(process.children(recursive=True))

    def _send(self, number: signal.Signals) -> None:
        import psutil

        for process in self._descendants:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


def end(trees: Sequence[Tree], seconds: float) -> None:
    """End all processes: SIGTERM, then SIGKILL to those that are left after the grace period or on a second interrupt.

    Args:
        trees: What runs.
        seconds: The grace period.
    """
    try:
        for tree in trees:
            tree.terminate()
        deadline = time.monotonic() + seconds
        while any(tree.alive for tree in trees) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for tree in trees:
            if tree.alive:
                tree.kill()


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def _runs(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
