"""The cost of a proof, compared with a step of the optimizer and a training step, in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

import distopt
from benchmarks import gpt
from benchmarks.arguments import COUNT
from distopt.engine import DDP


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks proof`."""
    parser = benchmarks.add_parser("proof", help="time of a proof, against a step of AdamW and a training step")
    gpt.add_sizes(parser, layers=8, width=512, batch_size=2, sequence_length=256)
    parser.add_argument("--rounds", type=COUNT, default=9, help="number of turns")
    parser.add_argument("--threads", type=COUNT, default=1, help="of the CPU")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the medians of the process time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    model = gpt.build(DDP(), device, options)
    optimizer = distopt.AdamW(distopt.param_groups(model), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (options.batch_size, options.sequence_length + 1), generator=generator).to(device)

    def train() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1]).logits
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        distopt.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()

    train()
    sides: dict[str, Callable[[], object]] = {
        "training step": train,
        "AdamW step": optimizer.step,
        "proof of weights": lambda: distopt.prove(optimizer, model, gradients=False),
        "proof of weights and gradients": lambda: distopt.prove(optimizer, model),
        "proof of weights, gradients, state": lambda: distopt.prove(optimizer, model, state=True),
        "fingerprint": lambda: distopt.fingerprint(model),
    }
    medians = _medians(sides, options.rounds, device)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.1f}M parameters in {len(list(model.parameters()))} tensors, {options.batch_size} x "
        f"{options.sequence_length} tokens, {device.type}, {options.threads} threads, {options.rounds} rounds"
    )
    print("| | ms | ns per parameter | / AdamW step | % of training, every 100th step |")
    print("|---|---|---|---|---|")
    for name, seconds in medians.items():
        share = seconds / medians["training step"]
        print(
            f"| {name} | {1e3 * seconds:.1f} | {1e9 * seconds / count:.2f} | "
            f"{seconds / medians['AdamW step']:.2f} | {share:.3f} |"
        )


def _medians(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(rounds + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                taken[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in taken.items()}
