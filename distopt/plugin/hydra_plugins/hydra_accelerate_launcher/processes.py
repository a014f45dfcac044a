"""Processes that are started, and ended, with all that they start."""

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
from typing import Any


class ProcessTree:
    """A command and its descendants, whatever process groups they make: torchrun's workers have their own.

    What it writes is added to `log`. It gets SIGTERM when this process dies, however it dies.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as out:
            self.root = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the sweep, which ends its jobs by itself
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        self._descendants: set[Any] = set()
        self._looked = 0.0

    def poll(self) -> int | None:
        """The exit code of the command, negative for a signal; None while it runs."""
        if time.monotonic() - self._looked > 1.0:
            self._look()
        return self.root.poll()

    @property
    def alive(self) -> bool:
        """Whether anything of it still runs."""
        self._look()
        return self.root.poll() is None or any(_runs(process) for process in self._descendants)

    def terminate(self) -> None:
        """SIGTERM to the command's process group, which hands it on; at once to what the command has left behind."""
        self._look()
        if self.root.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.root.pid, signal.SIGTERM)
        else:
            self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to everything."""
        self._look()
        if self.root.poll() is None:
            self.root.kill()
        self._send(signal.SIGKILL)
        self.root.wait()

    def _look(self) -> None:
        import psutil  # of Accelerate's requirements

        self._looked = time.monotonic()
        with contextlib.suppress(psutil.Error):
            # What has been waited for has no number any more that would be its own.
            root = [psutil.Process(self.root.pid)] if self.root.returncode is None else []
            for process in [*root, *filter(_runs, self._descendants)]:
                with contextlib.suppress(psutil.Error):
                    self._descendants.update(process.children(recursive=True))

    def _send(self, number: signal.Signals) -> None:
        import psutil

        for process in self._descendants:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


def end(trees: Sequence[ProcessTree], seconds: float) -> None:
    """Ends all of them: SIGTERM, and SIGKILL to what is left after the grace, or when somebody is tired of waiting."""
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
    """This process gets a signal when the one that started it dies. Only Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def _runs(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
