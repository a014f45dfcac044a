"""Real ranks for the tests: processes over gloo, started once for each world size and kept."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 120.0
# One process imports these and every rank is forked from it, which takes a second where importing takes ten.
_IMPORTED_ONCE = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
]


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    warnings.simplefilter("error")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_SECONDS),
    )
    linear = (
        torch.nn.functional.linear
    )  # DeepSpeed's stage 3 replaces it for the process, with one that rounds otherwise
    while (task := _receive(pipe)) is not None:
        function, args = task
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:
            answer = pickle.dumps((False, (error.__class__.__name__, str(error), traceback.format_exc())))
        pipe.send_bytes(answer)
        torch.nn.functional.linear = linear
        unset_hf_deepspeed_config()  # Accelerate sets it, and at stage 3 transformers cuts up every later model
    dist.destroy_process_group()


def _receive(pipe: Connection) -> Any:
    """What the other end sent; None if it is gone."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None


class RankError(AssertionError):
    """A rank raised; `kind` and `message` are those of its exception."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank} raised\n{trace}")
        self.kind, self.message = kind, message


class Ranks:
    """`run` calls a module-level function on every rank and returns the results by rank; every wait is bounded."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_ONCE)
        store = tempfile.mktemp(prefix="distopt-store-")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        # Pickled here, since a Connection would send each tensor as a shared-memory file.
        task = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        results: dict[int, Any] = {}
        failed: dict[int, tuple[str, str, str]] = {}
        end = time.monotonic() + _SECONDS
        while len(results) + len(failed) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results | failed}
            ready = wait(waiting, timeout=end - time.monotonic())
            if not ready:
                self.stop()
                if failed:  # these waited in a collective for those
                    break
                raise TimeoutError(f"{function.__name__}{args} did not end within {_SECONDS} s")
            for pipe in ready:
                rank = waiting[pipe]
                ok, value = _receive(pipe) or (False, ("EOFError", "the process died", "the process died"))
                (results if ok else failed)[rank] = value
                if not ok:
                    end = min(end, time.monotonic() + 5.0)
        if failed:
            if results or not self.alive:  # out of step with each other
                self.stop()
            rank, cause = next(iter(failed.items()))  # what came first is the cause
            raise RankError(rank, *cause)
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send_bytes(pickle.dumps(None))
        end = time.monotonic() + 5.0
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


_pool: dict[int, Ranks] = {}


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `function(*args)` on each of `world` ranks; `function` finds its rank by `torch.distributed`."""
    if world not in _pool or not _pool[world].alive:
        _pool[world] = Ranks(world)
    return _pool[world].run(function, *args)


def stop_all() -> None:
    for ranks in _pool.values():
        ranks.stop()
    _pool.clear()
