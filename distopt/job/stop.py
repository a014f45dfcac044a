"""A run that is asked to stop: the step is finished, a checkpoint saved, and an exit code says that it can go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

# What SLURM sends before it preempts a job, and before its time is over; submitit takes SIGUSR2 for both.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # the exit code: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"


class Stopped(Exception):
    """A run that has saved what it had when it was asked to stop."""


class StopSignal:
    """From its making to `restore`, SIGTERM, SIGUSR1 and SIGUSR2 are noted instead of ending this process.

    They may reach the ranks in different steps, and not all of them; so every step asks all of them, by `request`.
    Python has signals in the main thread only: in another one nothing is noted.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def request(self, like: torch.Tensor) -> torch.Tensor:
        """1 if this rank was asked to stop, else 0; to be summed over the ranks along with `like`."""
        return like.new_tensor(float(self.received))

    def restore(self) -> None:
        """The signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
