"""Faults, called in a rank before it runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

import distopt


def die_in_forward(call: int, rank: int = 1) -> None:
    """SIGKILL to one rank in the forward pass of a training step, while the others wait for its gradients."""
    from distopt.engine import train_step
    from distopt.job import job as program

    calls = iter(range(1, 1_000_000))

    def update(engine: Any, model: Any, optimizer: Any, batches: Any, norm: float, of: Any, **more: Any) -> Any:
        def fatal(*args: Any) -> torch.Tensor:
            loss = of(*args)
            if next(calls) == call and int(os.environ.get("RANK", "0")) == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        return train_step.update(engine, model, optimizer, batches, norm, fatal, **more)

    program.update = update


def die_in_save(step: int, file: str, rank: int) -> None:
    """Kills a rank when it has written a file of that step's checkpoint, and is about to put it on the disk."""
    sync = os.fsync

    def fatal(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if f"step_{step:08d}" in path and file in path and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = fatal


def poison(factors: dict[int, float], folder: str) -> None:
    """Makes the loss of rank 1 not finite in some forward passes, and writes what every step did to this rank."""
    from distopt.engine import train_step
    from distopt.job import job as program

    rank = int(os.environ.get("RANK", "0"))
    count, log = iter(range(1, 1_000_000)), Path(folder) / f"steps-{rank}.jsonl"

    def poisoned(*args: Any) -> torch.Tensor:
        loss = train_step.next_token_loss(*args)
        return loss * factors.get(next(count), 1.0) if rank == 1 else loss

    def watched(engine: Any, model: Any, optimizer: Any, batches: Any, norm: float, *_: Any, **more: Any) -> Any:
        done = train_step.update(engine, model, optimizer, batches, norm, poisoned, **more)
        with log.open("a") as file:
            file.write(json.dumps([done.applied, digest(optimizer)]) + "\n")
        return done

    program.update = watched


def digest(optimizer: distopt.ShardedOptimizer) -> str:
    """Of this rank's part of the weights, as the optimizer steps them, and of its state, bit for bit."""
    tensors = [*optimizer.layout.segments, *(t for state in optimizer.state.values() for t in state.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return hashlib.blake2b(b"".join(t.detach().contiguous().numpy().tobytes() for t in local)).hexdigest()


def full_disk(rank: int, saves: int) -> None:
    """After so many checkpoints this rank has no space left."""
    from distopt.job import job as program

    if int(os.environ.get("RANK", "0")) != rank:
        return
    save, count = program.Checkpointer.save, iter(range(1, 1000))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def saved(*args: Any) -> Path:
        if next(count) > saves:
            os.fsync = full
        return save(*args)

    program.Checkpointer.save = saved


def spoil_one_layer(name: str, value: float) -> None:
    """Makes the gradient of one layer not finite, in every step."""
    from distopt.job import job as program

    update = program.update

    def spoiled(engine: Any, model: Any, *args: Any, **more: Any) -> Any:
        parameter = dict(engine.unwrap(model).named_parameters())[name]
        handle = parameter.register_hook(lambda grad: grad * value)
        try:
            return update(engine, model, *args, **more)
        finally:
            handle.remove()

    program.update = spoiled


def count_passes(file: str) -> None:
    """Gives the model a statistic that every forward pass moves, as batch norm does, and writes it after each step."""
    from distopt.job import job as program

    update = program.update

    def count(module: Any, *_: Any) -> None:
        module.passes += int(torch.is_grad_enabled())

    def counted(engine: Any, model: Any, *args: Any, **more: Any) -> Any:
        inner = engine.unwrap(model)
        if not hasattr(inner, "passes"):
            inner.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)
            inner.register_forward_hook(count)
        done = update(engine, model, *args, **more)
        with Path(file).open("a") as lines:
            lines.write(f"{int(inner.passes)}\n")
        return done

    program.update = counted


def differ(words: list[str]) -> None:
    """Gives rank 1 other words on its command line."""
    import sys

    if os.environ["RANK"] == "1":
        sys.argv += words


def without_kernels() -> None:
    """Takes the compiled kernels from rank 1, as on a machine without a compiler."""
    if os.environ["RANK"] == "1":
        os.environ["DISTOPT_KERNELS"] = "off"


def pause(step: int, rank: int = 1) -> None:
    """Stops one rank in a step, as a machine that hangs: its process is there, and does nothing more."""
    from distopt.engine import train_step
    from distopt.job import job as program

    count = iter(range(1, 1_000_000))

    def update(*args: Any, **more: Any) -> Any:
        if next(count) == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_step.update(*args, **more)

    program.update = update


def nan_weight(step: int, rank: int = 1) -> None:
    """Makes one weight of a rank nan after a step."""
    from distopt.engine import train_step
    from distopt.job import job as program
    from distopt.layout.tensors import local

    count = iter(range(1, 1_000_000))

    def update(engine: Any, model: Any, *args: Any, **more: Any) -> Any:
        done = train_step.update(engine, model, *args, **more)
        if next(count) == step and int(os.environ.get("RANK", "0")) == rank:
            with torch.no_grad():
                local(next(engine.unwrap(model).parameters())).view(-1)[0] = torch.nan
        return done

    program.update = update


def elsewhere(folder: str) -> None:
    """Starts rank 1 in another folder, as on a machine with other files under the same names."""
    if os.environ["RANK"] == "1":
        os.chdir(folder)


SPIKED = "transformer.h.1.mlp.c_fc.weight"


def spike(pass_number: int) -> None:
    """Multiplies one layer's gradient by 10,000 in one pass of each rank."""
    from distopt.engine import train_step

    backward, passes = train_step.backward, [0]

    def spiked(engine: Any, model: Any, *args: Any, **more: Any) -> Any:
        loss = backward(engine, model, *args, **more)
        passes[0] += 1
        if passes[0] == pass_number:
            grad = engine.unwrap(model).get_parameter(SPIKED).grad
            with torch.no_grad():
                grad.mul_(1e4)
        return loss

    train_step.backward = spiked
