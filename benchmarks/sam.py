"""The cost of the SAM family compared with the optimizer alone: time, communication and memory of a training step."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distopt
from benchmarks import gpt
from benchmarks.arguments import COUNT
from benchmarks.collectives import Collectives, nbytes
from benchmarks.team import spawn
from distopt.data.text_data import TextData
from distopt.engine import DDP, FSDP2, Engine
from distopt.engine.train_step import update

BASE = "AdamW"
SIDES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = {
    BASE: lambda optimizer: optimizer,
    "SAM": distopt.SAM,
    "SAM, scope=local": lambda optimizer: distopt.SAM(optimizer, scope="local"),
    "SAM, interval=5": lambda optimizer: distopt.SAM(optimizer, interval=5),
    "LookSAM, k=5": distopt.LookSAM,
    "ASAM": distopt.ASAM,
    "AWP": distopt.AWP,
    "GSAM": distopt.GSAM,
    "FriendlySAM": distopt.FriendlySAM,
    "MomentumSAM": distopt.MomentumSAM,
    "PreconditionedSAM": distopt.PreconditionedSAM,
    "FunctionalSAM": distopt.FunctionalSAM,
}
INTERVAL = 5  # turns are multiples of it, so that all have equally many second passes
ENGINES: dict[str, Callable[[], Engine]] = {"ddp": DDP, "fsdp2": FSDP2}


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks sam`."""
    parser = benchmarks.add_parser("sam", help="time, communication and memory of a step of the SAM family")
    parser.add_argument("--engine", choices=list(ENGINES), default="ddp")
    parser.add_argument("--only", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="NAME")
    gpt.add_sizes(parser, layers=4, width=128, batch_size=16, sequence_length=128)
    parser.add_argument("--rounds", type=COUNT, default=11, help="number of turns of the sides")
    parser.add_argument("--intervals", type=COUNT, default=1, help=f"intervals of {INTERVAL} steps in a turn")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a Markdown table with a row for each side; `scope=local` only where every rank has full weights."""
    gpt.check_batch(options)
    TextData().build()
    spawn(options.processes, _measure, options)


def _measure(device: torch.device, options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    sequences = gpt.sequences(options)
    only = [name for name in SIDES if name in {BASE, *options.only}]
    names = [name for name in only if options.engine == "ddp" or name != "SAM, scope=local"]
    sides = {name: Side(name, device, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}  # process time, which other load does not change
    steps = INTERVAL * options.intervals
    for turn in range(options.rounds + 1):
        batches = [sequences.batch(turn * steps + i, rank, world).to(device) for i in range(steps)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if not turn:  # the first turn warms up and counts, since the counts are the same in all
                sides[name].weigh(batches)
                continue
            dist.barrier()
            started, began = time.perf_counter(), time.process_time()
            for batch in batches:
                sides[name].step(batch)
            busy[name].append((time.process_time() - began) / steps)
            dist.barrier()
            seconds[name].append((time.perf_counter() - started) / steps)
    if rank == 0:
        print(f"{options.engine}, {world} processes, {sides[BASE].parameters:,} parameters, ", end="")
        print(f"medians of {options.rounds} turns of {steps} steps\n")
        print(f"| | ms/step | / {BASE} | CPU time / {BASE} | MB/step | bytes/parameter |\n|---|---|---|---|---|---|")
        base, base_busy = statistics.median(seconds[BASE]), statistics.median(busy[BASE])
        for name, side in sides.items():
            median, worked = statistics.median(seconds[name]), statistics.median(busy[name]) / base_busy
            sent, memory = side.communicated / 1e6, side.additional / side.parameters
            print(f"| {name} | {1e3 * median:.1f} | {median / base:.3f} | {worked:.3f} | {sent:.3f} | {memory:.2f} |")


class Side:
    """A model with its optimizer.

    Attributes:
        communicated: The bytes of the collectives of a step.
        additional: The bytes of a rank in addition to those of `BASE`.
    """

    def __init__(self, name: str, device: torch.device, options: argparse.Namespace) -> None:
        self.parameters = gpt.numel(options)
        self.engine = ENGINES[options.engine]()
        self.model = gpt.build(self.engine, device, options)
        base = distopt.AdamW(distopt.param_groups(self.model, 0.1), lr=1e-3)
        self.optimizer = SIDES[name](base)
        self.communicated, self.additional = 0.0, 0

    def step(self, batch: Tensor) -> None:
        """Run a training step, as `distopt.train` does."""
        update(self.engine, self.model, self.optimizer, [batch], 1.0)

    def weigh(self, batches: list[Tensor]) -> None:
        """Count bytes over whole intervals of steps."""
        for batch in batches:  # creates the state, and DDP rebuilds its buckets
            self.step(batch)
        with Collectives() as mode:
            for batch in batches:
                self.step(batch)
        self.communicated = mode.bytes / len(batches)
        if isinstance(self.optimizer, distopt.SAM):
            self.additional = self._additional_bytes(self.optimizer, batches)

    def _additional_bytes(self, sam: distopt.SAM, batches: list[Tensor]) -> int:
        """Return the bytes of SAM's own state, and of its copies at the peak of the second pass."""
        copies, slopes = [], []

        def perturb() -> Tensor:
            grads = [p.grad for p in self.model.parameters()]  # Python sees a gradient only after it was accessed
            before = _live()
            norm = type(sam).perturb(sam)
            copies.append(_live() - before)
            slopes.append(nbytes(getattr(sam, "_slopes", [])))
            del grads
            return norm

        sam.perturb = perturb  # type: ignore[method-assign]
        for batch in batches:
            self.step(batch)
        del sam.perturb
        own = [state[name] for state in sam.state.values() for name in sam.buffers]
        return max(copies) + max(slopes) + nbytes(own)


def _live() -> int:
    """Return the bytes of all tensors that Python knows."""
    gc.collect()
    found = [
        x for x in gc.get_objects() if issubclass(type(x), Tensor)
    ]  # isinstance would load lazy modules, which warn
    tensors = [x for x in found if not hasattr(x, "to_local")]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
