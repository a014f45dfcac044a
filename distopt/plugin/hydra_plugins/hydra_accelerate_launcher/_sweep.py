"""The loop of a sweep, which runs several jobs at the same time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from . import _log as log
from ._config import SweepConf
from ._errors import JobFailed
from ._halving import Halving
from ._job import Job
from ._places import Place
from ._processes import end

POLL_SECONDS = 0.1


def run(jobs: Sequence[Job], options: SweepConf, halving: Halving, place: Callable[[], Place]) -> list[JobReturn]:
    """Run the jobs that are not done yet.

    A job that fails is marked, and the others continue. SIGINT and SIGTERM end the running jobs, and then this process.

    Args:
        jobs: The jobs.
        options: The options of the launcher.
        halving: Says which jobs are stopped; knows those of earlier calls.
        place: Returns where they run; called if there is one to run.

    Returns:
        The results of all jobs, in their order.
    """
    done = [job for job in jobs if options.resume and job.done()]
    waiting = [job for job in jobs if job not in done]
    where = place() if waiting else None
    with _bar(len(jobs)) as bar, _signals() as received:
        for job in done:
            halving.judge(job.number, job.folder)
            _say(bar, f"#{job.number} {job.label}: {_value(job)}, done before")
            bar.update()
        running: dict[int, Job] = {}
        try:
            while (waiting or running) and not received:
                for slot in range(options.jobs):
                    if slot not in running and waiting and where and not received:
                        running[slot] = job = waiting.pop(0)
                        try:
                            how = where.start(job, slot)
                        except JobFailed as error:
                            del running[slot]
                            job.fail(error)
                            how = f"failed: {error}"
                            bar.update()
                        _say(bar, f"#{job.number} {job.label}: {how}, {_near(job.log)}")
                time.sleep(POLL_SECONDS)
                for slot, job in list(running.items()):
                    if where and (how := _ended(job, options, halving, where)):
                        del running[slot]
                        bar.set_postfix_str("", refresh=False)  # the last line of its log
                        _say(bar, f"#{job.number} {job.label}: {how}, {job.seconds:.1f} s")
                        bar.update()
                if running and not bar.disable:
                    written = log.lines(next(iter(running.values())).log, most=4096) or [""]
                    bar.set_postfix_str("" if written[-1].startswith("$ ") else written[-1][:60])
        finally:
            bar.set_postfix_str("", refresh=False)
            end([job.tree for job in running.values() if job.tree], options.grace_seconds + 5)
        if received:
            finished = sum(job.result.status == JobStatus.COMPLETED for job in jobs)
            name = signal.Signals(received[0]).name
            _say(bar, f"{name}: {finished} of {len(jobs)} jobs are done; the same command resumes with the others")
            raise SystemExit(128 + received[0])
        failed = [f"#{job.number}" for job in jobs if job.result.status == JobStatus.FAILED]
        if failed:
            which = ", ".join(failed)
            _say(bar, f"{len(failed)} of {len(jobs)} jobs failed: {which}; the same command runs them again")
        elif done:
            _say(bar, f"{len(done)} of {len(jobs)} jobs were done before; hydra.launcher.resume=false runs them again")
    return [job.result for job in jobs]


def _ended(job: Job, options: SweepConf, halving: Halving, where: Place) -> str:
    """Return how a job has ended, by itself, at its time limit or at a rung; end the processes that it leaves behind.

    It is empty while the job runs.
    """
    assert job.tree is not None
    code, stop = job.tree.poll(), halving.judge(job.number, job.folder, job.started)
    late = where.late(job)
    if code is None and not late and stop is None:
        return ""
    if job.tree.alive:
        end([job.tree], options.grace_seconds + 5 if code is None else 5)
    if stop is not None and code is None:
        job.stop(stop)
        return str(stop)
    job.finish(1 if code is None else code, late)
    halving.judge(job.number, job.folder, job.started)  # its last rows, for those that follow
    return _value(job) + halving.missing(job.number)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM, without effect outside of the main thread; a second one has its usual effect."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for previous in before.items():
            signal.signal(*previous)


def _bar(total: int) -> Any:
    from tqdm import tqdm  # a requirement of Accelerate, through huggingface_hub

    return tqdm(total=total, unit="job", desc="sweep", dynamic_ncols=True, disable=None)


def _say(bar: Any, line: str) -> None:
    bar.write(line, file=sys.stderr)
    sys.stderr.flush()


def _value(job: Job) -> str:
    if job.result.status == JobStatus.FAILED:
        return f"failed: {job.result._return_value}"
    value = job.result.return_value
    return f"{value:.6g}" if isinstance(value, float) else "done" if value is None else str(value)


def _near(path: Path) -> str:
    """Return a path relative to the working directory, if it is inside of it."""
    return str(path.relative_to(os.getcwd())) if path.is_relative_to(os.getcwd()) else str(path)
