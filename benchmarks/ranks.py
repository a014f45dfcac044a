"""Processes for a benchmark that is started without a launcher."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def spawn(world: int, function: Callable[..., None], *args: Any) -> None:
    """Runs `function(device, *args)` on `world` ranks: one for each GPU over nccl, or CPU processes over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (world, f"{folder}/store", function, args), nprocs=world)


def _start(rank: int, world: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(_join(rank, world, store), *args)
    dist.destroy_process_group()


def _join(rank: int, world: int, store: str, seconds: float = 1800.0) -> torch.device:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    return device


class TeamError(RuntimeError):
    """What a team could not do, and why, in one line."""


class Team:
    """Ranks in processes of their own, with a process group of their own, that hold an object and wait for calls.

    Teams that live at the same time take turns without disturbing each other, and one that fails takes none along.
    Every wait is bounded: a rank that raises, dies or does not answer in time ends its team, with the reason.

    make: `make(device, *args)` makes what a rank holds; a function or a class of a module, with arguments to pickle.
    seconds: how long making it, and each call, may take.
    Raises TeamError, as `call` does.
    """

    def __init__(self, world: int, make: Callable[..., Any], *args: Any, seconds: float = 300.0) -> None:
        # Forked from one process that has imported what takes long. Not where CUDA may have been asked for devices.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([make.__module__, *_IMPORTED_ONCE])
        self.seconds = seconds
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            given = (rank, world, f"{self._folder.name}/store", seconds, theirs, make, args)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers("start")

    def call(self, name: str, *args: Any) -> list[Any]:
        """The results of this method, by rank; all ranks run it at the same time."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it died: its answer says so
                pipe.send_bytes(pickle.dumps((name, args)))
        return self._answers(name)

    def stop(self) -> None:
        """Ends the processes, at the latest in five seconds."""
        for pipe in self._pipes:
            pipe.close()  # they read its end
        end = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes.clear()
        self._folder.cleanup()

    def _answers(self, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
        end = time.monotonic() + self.seconds
        while len(results) + len(failures) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                failures.append(f"{name} did not end within {self.seconds:g} s")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    done, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._processes[rank].join(5.0)
                    done, value = False, f"the process ended with exit code {self._processes[rank].exitcode}"
                if done:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
            if failures:  # the others may wait for that rank, in a collective
                self.stop()
                raise TeamError(failures[0])
        return [results[rank] for rank in range(len(self._pipes))]


_IMPORTED_ONCE = ["torch.distributed.fsdp", "torch.distributed.optim", "transformers.models.gpt2.modeling_gpt2"]


def _serve(
    rank: int,
    world: int,
    store: str,
    seconds: float,
    pipe: Connection,
    make: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.dup2(2, 1)  # what libraries print is not among the results
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    held: Any = None

    def answer(task: Callable[[], Any]) -> None:
        try:
            result = pickle.dumps((True, task()))
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            result = pickle.dumps((False, f"{type(error).__name__}: {lines[0]}"))
        pipe.send_bytes(result)

    def start() -> None:
        nonlocal held
        held = make(_join(rank, world, store, seconds), *args)

    with contextlib.suppress(EOFError, OSError):  # whoever asks is gone
        answer(start)
        while True:
            name, given = pickle.loads(pipe.recv_bytes())
            answer(partial(getattr(held, name), *given))
    os._exit(0)  # whatever the libraries would still wait for
