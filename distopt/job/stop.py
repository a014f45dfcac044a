"""The end of a run, or its stop by a signal: it takes its step, saves, and exits with a code for "resume me"."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from distopt.job.job import Job

# SLURM sends SIGTERM and SIGUSR1 before it preempts a job and before its time limit; submitit uses SIGUSR2 for both. A
# terminal that is closed, as by a lost connection, sends SIGHUP; `nohup` has it ignored, and so it stays.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOPPED = 75  # the exit code: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"


class Stopped(Exception):
    """Raised when a run has saved a checkpoint after a signal to stop."""


class StopSignal:
    """Records the signals that ask a run to stop, instead of ending the process, until `restore`.

    Signals may reach the ranks in different steps, and not all of the ranks, so that every step sums `request` over all
    ranks. Python delivers signals to the main thread only; in another thread nothing is recorded.

    Attributes:
        received: Whether this process has received one.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}

    def request(self, like: torch.Tensor) -> torch.Tensor:
        """Returns a scalar on the device of `like`: 1 if this rank was asked to stop, else 0."""
        return like.new_tensor(float(self.received))

    def restore(self) -> None:
        """Restores the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def leave(job: Job) -> None:
    """Gives the folder of a job to the next one, and ends its trackers; every rank has to call it."""
    if job.lock:
        job.lock.release()
    job.accelerator.wait_for_everyone()  # gloo may abort a process that still talks to one which has ended
    job.accelerator.end_training()


def stop(job: Job) -> NoReturn:
    """Ends a job that was asked to stop, and has saved; every rank has to call it.

    Raises:
        Stopped: With the way back.
    """
    job.checkpointer.wait()
    leave(job)
    raise Stopped(
        f"by a signal, after step {job.step} of {job.cfg.train.steps}; train.resume=auto resumes from "
        f"{job.checkpoint or 'the start: there is no checkpoint yet'}"
    )
