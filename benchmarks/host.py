"""What a step costs the host: Llama-70B's 723 tensors under FSDP2, on one rank of a process group that sends nothing.

The shards are tiny, so that the time is that of Python, which on a GPU passes before a kernel can start.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distopt
from benchmarks.arguments import COUNT
from distopt.optim.clip import step_clipped

_MAX_NORM = 1e-3
_BLOCKS = 80
_COLUMNS = 4  # of each matrix, in the place of thousands


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks host`."""
    parser = benchmarks.add_parser("host", help="CPU time of clipping and step for 723 tiny DTensors, at many ranks")
    parser.add_argument("--ranks", type=COUNT, default=4096)
    parser.add_argument("--rounds", type=COUNT, default=15, help="number of turns")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the medians of the CPU time of one thread."""
    tensors, seconds = measure(options.ranks, options.rounds)
    print(f"torch {torch.__version__}, {tensors} DTensors at {options.ranks} ranks; CPU time, one thread;")
    print(f"medians of {options.rounds} rounds in turns\n\n| | ms |\n|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {1e3 * taken:.2f} |")


def measure(ranks: int, rounds: int, blocks: int = _BLOCKS, only: Sequence[str] = ()) -> tuple[int, dict[str, float]]:
    """Return the number of tensors, and the median CPU seconds of what is timed, by name.

    Args:
        ranks: The ranks of the process group.
        rounds: The turns.
        blocks: The blocks of the model, of 9 tensors each.
        only: The names of what is timed; all if empty.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    params = _params(ranks, blocks)
    parts = {name: part for name, part in _parts(params).items() if not only or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 2):
        for name in parts if turn % 2 else reversed(parts):
            started = time.process_time()
            parts[name]()
            if turn > 1:  # the first ones make state and layouts
                seconds[name].append(time.process_time() - started)
    dist.destroy_process_group()
    return len(params), {name: statistics.median(taken) for name, taken in seconds.items()}


def _params(world: int, blocks: int) -> list[nn.Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world,))
    block: list[tuple[int, ...]] = [(8192, _COLUMNS), (1024, _COLUMNS), (1024, _COLUMNS), (8192, _COLUMNS)]
    block += [(28672, _COLUMNS), (28672, _COLUMNS), (8192, _COLUMNS), (8192,), (8192,)]

    def drawn(shape: tuple[int, ...]) -> DTensor:
        rows = -(-shape[0] // world)
        part = torch.randn(rows, *shape[1:]) * 0.01
        stride = (1,) if len(shape) == 1 else (shape[1], 1)
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)

    shapes = [(32000, _COLUMNS), *block * blocks, (8192,), (32000, _COLUMNS)]
    params = [nn.Parameter(drawn(shape)) for shape in shapes]
    for p, shape in zip(params, shapes):
        p.grad = drawn(shape)
    return params


def _parts(params: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""

    def made(cls: Any, **options: Any) -> Any:
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = cls(groups, lr=1e-5, **options)
        distopt.prove_every(optimizer, steps=0)  # it would talk to other ranks
        return optimizer

    def clipped(optimizer: Any) -> Callable[[], Any]:
        return lambda: step_clipped(optimizer, distopt.Clip(optimizer, _MAX_NORM))

    def torch_clipped() -> None:
        nn.utils.clip_grad_norm_(params, _MAX_NORM)
        fused.step()

    def sam_step() -> None:
        sam.perturb()
        sam.restore()
        sam.step()

    adamw, lamb, fused = made(distopt.AdamW), made(distopt.LAMB), made(torch.optim.AdamW, fused=True)
    sam = distopt.SAM(made(torch.optim.SGD))
    return {
        "distopt AdamW": adamw.step,
        "distopt LAMB": lamb.step,
        "torch AdamW fused": fused.step,
        "distopt clip + AdamW": clipped(adamw),
        "distopt clip + LAMB": clipped(lamb),
        "torch clip + AdamW fused": torch_clipped,
        "distopt.clip_grad_norm_ of torch's AdamW": lambda: distopt.clip_grad_norm_(fused, _MAX_NORM),
        "torch SGD": sam.optimizer.step,
        "SAM around it, without the passes": sam_step,
    }
