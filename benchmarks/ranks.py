"""A pool of ranks: processes that form a process group and run functions, for the benchmarks and for the tests."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

IMPORTED_ONCE = ("torch.distributed.fsdp", "torch.distributed.optim", "transformers.models.gpt2.modeling_gpt2")
_GRACE = 5.0  # seconds that the other ranks get once one has failed, and that processes get to end


class RankError(AssertionError):
    """A call that raised on a rank; its text has the traceback of that rank.

    Attributes:
        kind: The class name of the rank's exception.
        message: The text of the rank's exception.
        reason: Rank, class name and the first line of the message, in one line.
    """

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank} raised\n{trace}")
        self.kind, self.message = kind, message
        first_line = (message.strip().splitlines() or [""])[0]
        self.reason = f"rank {rank}: {kind}: {first_line}" if kind else f"rank {rank}: {first_line}"


class RankSetup(NamedTuple):
    """What every rank of a pool does around the calls.

    Attributes:
        imports: Modules that one process imports before the ranks are forked from it, which takes a second where
            importing them in every rank takes ten. Without any, the fork server is taken as it is.
        gpu: Whether rank i computes on GPU i over nccl; otherwise on the CPU over gloo.
        threads: The number of threads of a rank on the CPU; by default the cores are shared equally.
        keeps_stdout: Whether a rank may print; otherwise its standard output goes to standard error.
        before: A function that runs in each rank before it joins the process group.
        after: A function that runs in each rank after every call.
    """

    imports: Sequence[str] = IMPORTED_ONCE
    gpu: bool = False
    threads: int | None = None
    keeps_stdout: bool = False
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None


class Ranks:
    """Processes with a process group of their own, which stay alive between calls.

    Pools that live at the same time do not disturb each other, and one that fails leaves the others alone. Every wait
    is bounded.

    Args:
        world: The number of ranks.
        seconds: The time limit of a call, and of a collective.
        setup: What every rank does around the calls.
    """

    def __init__(self, world: int, seconds: float, setup: RankSetup) -> None:
        # A process that may have initialized CUDA cannot be forked.
        method = "spawn" if setup.gpu else "forkserver"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver" and setup.imports:
            context.set_forkserver_preload(list(setup.imports))
        self.seconds = seconds
        self._folder = tempfile.TemporaryDirectory(prefix="distopt-ranks-")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            args = (rank, world, f"{self._folder.name}/store", seconds, setup, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether the pool can run a call."""
        return bool(self._pipes) and all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> list[Any]:
        """Call a function of a module on every rank at the same time.

        Args:
            function: The function; it finds its rank through `torch.distributed`.
            args: Its arguments, which are pickled.
            name: What an error calls the function; by default its own name with the arguments.

        Returns:
            The results, by rank.

        Raises:
            RankError: If a rank raised or died; the first failure is reported, since it is the cause of the others.
                The pool ends unless every rank raised, because the ranks would be out of step with each other.
            TimeoutError: If a rank did not answer within `seconds`; the pool ends.
        """
        task = pickle.dumps((function, args))  # here, since a Connection would send each tensor as a shared-memory file
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a dead process is reported by its missing answer
                pipe.send_bytes(task)
        results: dict[int, Any] = {}
        failures: dict[int, tuple[str, str, str]] = {}
        end = time.monotonic() + self.seconds
        while len(results) + len(failures) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results | failures}
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                if failures:  # the others waited for these ranks in a collective
                    break
                raise TimeoutError(f"{name or f'{function.__name__}{args}'} did not end within {self.seconds:g} s")
            for rank in [waiting[pipe] for pipe in waiting if pipe in ready]:
                succeeded, value = _receive(self._pipes[rank]) or (False, self._death(rank))
                (results if succeeded else failures)[rank] = value
                if not succeeded:
                    end = min(end, time.monotonic() + _GRACE)
        if failures:
            if results or not self.alive:
                self.stop()
            rank, cause = next(iter(failures.items()))
            raise RankError(rank, *cause)
        return [results[rank] for rank in range(len(self._processes))]

    def stop(self) -> None:
        """End the processes; they are killed after five seconds."""
        for pipe in self._pipes:
            pipe.close()  # a rank ends when it reads the end of its pipe
        self._join()
        for process in self._processes:
            if process.is_alive():
                process.kill()
        self._join()
        self._pipes.clear()
        self._folder.cleanup()

    def _join(self) -> None:
        """Wait until all processes have ended, for five seconds at most."""
        end = time.monotonic() + _GRACE
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))

    def _death(self, rank: int) -> tuple[str, str, str]:
        self._processes[rank].join(_GRACE)
        message = f"the process ended with exit code {self._processes[rank].exitcode}"
        return "", message, message


def _serve(rank: int, world: int, store: str, seconds: float, setup: RankSetup, pipe: Connection) -> None:
    if not setup.keeps_stdout:
        os.dup2(2, 1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    while (task := _receive(pipe)) is not None:
        function, args = task
        try:
            if not dist.is_initialized():
                _join(rank, world, store, seconds, setup)
            torch.manual_seed(0)  # whatever ran before: the same numbers, and equal ones on every rank
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:
            answer = pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc())))
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # the parent may have stopped waiting
            pipe.send_bytes(answer)
        if setup.after:
            setup.after()
    os._exit(0)  # without waiting for threads of the libraries


def _join(rank: int, world: int, store: str, seconds: float, setup: RankSetup) -> None:
    if setup.before:
        setup.before()
    if setup.gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(setup.threads or max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group(
        "nccl" if setup.gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=min(seconds, 1800.0)),
    )


def _receive(pipe: Connection) -> Any:
    """Return what the other end sent, or None if it is closed."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return None
