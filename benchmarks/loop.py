"""The training step of `distopt.train` compared with a plain torch loop: the same FSDP2 model on the same batches."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import distopt
from benchmarks import gpt
from benchmarks.arguments import COUNT
from benchmarks.team import spawn
from distopt.data.text_data import TextData
from distopt.engine import FSDP2
from distopt.engine.train_step import update


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks loop`."""
    parser = benchmarks.add_parser("loop", help="tokens/s of our training step against a plain torch loop")
    gpt.add_sizes(parser, layers=4, width=128, batch_size=16, sequence_length=128)
    parser.add_argument("--rounds", type=COUNT, default=15, help="number of turns of the two sides")
    parser.add_argument("--steps", type=COUNT, default=10, help="steps in a turn")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the medians of both sides and their ratio."""
    gpt.check_batch(options)
    TextData().build()
    spawn(options.processes, _measure, options)


def _measure(device: torch.device, options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    sequences = gpt.sequences(options)
    sides = {"distopt": _ours(device, options), "plain torch": _plain(device, options)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    step = 0
    for turn in range(options.rounds + 1):
        batches = [sequences.batch(step + i, rank, world).to(device) for i in range(options.steps)]
        step += options.steps
        for name in sides if turn % 2 else reversed(sides):
            dist.barrier()
            started = time.perf_counter()
            for batch in batches:
                losses[name] = sides[name](batch)
            dist.barrier()
            if turn:  # the first turn warms up
                seconds[name].append((time.perf_counter() - started) / options.steps)
    mean = torch.tensor(losses["plain torch"], device=device)  # over the ranks, as the loss of distopt is
    dist.all_reduce(mean)
    losses["plain torch"] = mean.item() / world
    if rank == 0:
        tokens = options.batch_size * options.sequence_length
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"{name:12} {tokens / median:10,.0f} tokens/s  {1e3 * median:8.2f} ms/step  loss {losses[name]:.5f}")
        ratio = statistics.median(seconds["plain torch"]) / statistics.median(seconds["distopt"])
        print(f"ratio of medians, distopt / plain: {ratio:.3f}  ({options.rounds} turns of {options.steps} steps each)")


def _ours(device: torch.device, options: argparse.Namespace) -> Callable[[Tensor], float]:
    engine = FSDP2()
    model = gpt.build(engine, device, options)
    optimizer = distopt.AdamW(distopt.param_groups(model, 0.1), lr=1e-3)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=10, total_steps=10_000)

    def step(batch: Tensor) -> float:
        done = update(engine, model, optimizer, [batch], 1.0)
        schedule.step()
        dist.all_reduce(done.loss)  # as distopt.train does, for the log
        return done.loss.item() / dist.get_world_size()

    return step


def _plain(device: torch.device, options: argparse.Namespace) -> Callable[[Tensor], float]:
    model = gpt.build(FSDP2(), device, options)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=10, total_steps=10_000)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step
