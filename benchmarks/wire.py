"""The bytes that a training step sends on each engine, by formula, by torch's and by the kernel's count; its time."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from benchmarks import gpt, muons, peers
from benchmarks.arguments import COUNT
from benchmarks.collectives import Collectives, nbytes, written
from benchmarks.team import spawn
from distopt import layout
from distopt.data.text_data import TextData
from distopt.engine import DDP, FSDP2, Engine, Zero1
from distopt.engine.train_step import update
from distopt.layout import full_shape
from distopt.models.language_model import blocks
from distopt.optim.newton_schulz import newton_schulz_cost
from distopt.plan.footprint import Param
from distopt.plan.matrices import matrix_wire


class FullGradients(DDP):
    """ZeRO-1 over DDP with all-reduced gradients: `layout.zero1_layout`."""

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        optimizer.bind(layout.zero1_layout(self.unwrap(model)))
        return model


def adamw(model: nn.Module) -> distopt.AdamW:
    """Return the optimizer of the sides whose rule needs nothing of other ranks."""
    return distopt.AdamW(distopt.param_groups(model, muons.WEIGHT_DECAY), lr=muons.LR)


def muon(make: Callable[[muons.Groups], Any], model: nn.Module) -> Any:
    """Return a Muon for the hidden matrices of a model."""
    return make(distopt.param_groups(model, muons.WEIGHT_DECAY, matrices="muon"))


class Side(NamedTuple):
    """An engine, and the number of times that each of N ranks sends (N-1)/N of the parameters in a step.

    Attributes:
        engine: Makes the engine.
        inside: The number for parameters of the blocks.
        outside: The number for the other parameters.
        optimizer: Makes the optimizer of a model. Muon's matrices come on top, for distopt's by `distopt.plan`.
    """

    engine: Callable[[], Engine]
    inside: float
    outside: float
    optimizer: Callable[[nn.Module], Any] = adamw


SIDES = {
    "ddp": Side(DDP, 2, 2),
    "zero1, full gradients": Side(FullGradients, 3, 3),
    "zero1": Side(Zero1, 2, 2),
    "zero1, overlap_gather": Side(partial(Zero1, overlap_gather=True), 2, 2),
    "zero1, reduce_dtype=bf16": Side(partial(Zero1, reduce_dtype="bf16"), 1.5, 1.5),
    "zero2": Side(partial(FSDP2, reshard_after_forward=False), 2, 2),
    "fsdp2": Side(FSDP2, 3, 2),
}
MUON_SIDES = {
    "ddp, Muon": Side(DDP, 2, 2, partial(muon, muons.of_distopt)),
    "ddp, torch Muon": Side(DDP, 2, 2, partial(muon, muons.of_torch)),
    "zero1, Muon": Side(Zero1, 2, 2, partial(muon, muons.of_distopt)),
    "fsdp2, Muon": Side(FSDP2, 3, 2, partial(muon, muons.of_distopt)),
    "fsdp2, torch Muon": Side(FSDP2, 3, 2, partial(muon, muons.of_torch)),
}
ALL = SIDES | MUON_SIDES


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks wire`."""
    parser = benchmarks.add_parser("wire", help="bytes sent and time of a step on each engine")
    parser.add_argument("--only", nargs="+", default=list(ALL), choices=list(ALL), metavar="NAME")
    gpt.add_sizes(parser, layers=12, width=256, batch_size=4, sequence_length=64)
    parser.add_argument("--rounds", type=COUNT, default=11, help="number of turns of the sides")
    parser.add_argument("--steps", type=COUNT, default=2, help="steps in a turn")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a Markdown table with a row for each side; times are relative to the first."""
    gpt.check_batch(options)
    TextData().build()
    spawn(options.processes, _measure, options)


def _measure(device: torch.device, options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    sequences = gpt.sequences(options)
    names = [name for name in ALL if name in options.only]
    sides = {name: _step(name, device, options) for name in names}
    rows = {name: _count(name, *sides[name], sequences.batch(0, rank, world).to(device)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        batches = [sequences.batch(turn * options.steps + i, rank, world).to(device) for i in range(options.steps)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            started = time.perf_counter()
            for batch in batches:
                sides[name][0](batch)
            dist.barrier()
            seconds[name].append((time.perf_counter() - started) / options.steps)
    if rank == 0:
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        print(f"{world} processes, medians of {options.rounds} turns of {options.steps} steps; MB that a rank sends\n")
        print("| | ms/step | ratio | collectives | formula, MB | counted, MB | by the kernel, MB |")
        print("|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            print(f"| {name} | {1e3 * medians[name]:.1f} | {medians[name] / medians[names[0]]:.3f} | {row}")


def _step(name: str, device: torch.device, options: argparse.Namespace) -> tuple[Callable[[Tensor], Any], nn.Module]:
    engine = ALL[name].engine()
    model = gpt.build(engine, device, options)
    optimizer = ALL[name].optimizer(engine.unwrap(model))
    if isinstance(optimizer, muons.Both):
        return peers.torch_loop(engine, model, optimizer), engine.unwrap(model)
    model = engine.attach(model, optimizer, 1, 1.0)

    def step(batch: Tensor) -> None:
        update(engine, model, optimizer, [batch], 1.0)

    return step, engine.unwrap(model)


def _count(name: str, step: Callable[[Tensor], Any], model: nn.Module, batch: Tensor) -> str:
    """Return the cells of a typical step, after the state was created and DDP has rebuilt its buckets."""
    for _ in range(2):
        step(batch)
    dist.barrier()
    before = written()
    with Collectives() as mode:
        step(batch)
    dist.barrier()
    sent = written() - before
    world, side = dist.get_world_size(), ALL[name]
    inside = [p for block in blocks(model) for p in block.parameters()]
    own = nbytes(inside) * (world if hasattr(inside[0], "placements") else 1)
    every = nbytes(model.parameters()) * (world if hasattr(inside[0], "placements") else 1)
    formula = (side.inside * own + side.outside * (every - own)) * (world - 1) / world
    if isinstance(side.optimizer, partial) and side.optimizer.args == (muons.of_distopt,):
        groups = distopt.param_groups(model, matrices="muon")
        hidden = [p for group in groups if group["rule"] == "muon" for p in group["params"]]
        units = [[Param(full_shape(p), True, 1, work=newton_schulz_cost) for p in hidden]]
        formula += sum(c.sent for c in matrix_wire(side.engine(), units, world))
    return f"{len(mode.seen)} | {formula / 1e6:.2f} | {mode.sent / 1e6:.2f} | {sent / 1e6:.2f} |"
