"""The cost of watching a run's health: training steps with and without a monitor, in turns, by CPU seconds."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

import distopt
from distopt.engine import DDP
from distopt.engine.train_step import update
from distopt.models.language_model import LanguageModel, blocks

_VOCABULARY = 256


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks health`."""
    parser = benchmarks.add_parser("health", help="the cost of norms of every layer in every step")
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "LAMB", "SGD"], help="classes of distopt")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=15, help="number of turns")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table: CPU seconds of a training step, and of its update alone, without and with a monitor."""
    for name in ("batch", "length", "rounds"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be >= 1, got {getattr(options, name)}")
    torch.manual_seed(0)
    engine = DDP(precision="fp32")
    engine.start()
    source = LanguageModel("gpt2", {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": options.length})
    config = source.describe(_VOCABULARY)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {options.rounds} rounds in turns")
    print("| optimizer | step, ms | watched / not | update alone, ms | watched / not |\n|---|---|---|---|---|")
    for name in options.optimizers:
        empty = source.empty(config)
        model = engine.build(empty, blocks(empty), partial(source.fill, empty), torch.device("cpu"))
        optimizer = getattr(distopt, name)(distopt.param_groups(engine.unwrap(model), weight_decay=0.01), lr=1e-4)
        steps, updates = measure(engine, model, optimizer, options)
        print(
            f"| {name} | {1e3 * steps[0]:.1f} | {steps[1] / steps[0]:.4f} | {1e3 * updates[0]:.2f} | "
            f"{updates[1] / updates[0]:.2f} |",
            flush=True,
        )


def measure(
    engine: Any, model: torch.nn.Module, optimizer: Any, options: argparse.Namespace
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the median CPU seconds of a step and of clipping and update alone, each without and with a monitor."""
    batch = torch.randint(_VOCABULARY, (options.batch, options.length + 1))
    seconds: dict[tuple[str, bool], list[float]] = {(what, on): [] for what in "su" for on in (False, True)}
    for turn in range(options.rounds + 2):
        for watched in (False, True) if turn % 2 else (True, False):
            monitor = None
            if watched:
                monitor = distopt.health.Monitor(optimizer, engine.unwrap(model), on_alarm=lambda alarm: None)
            for i in range(3):  # the second and the third carry norms of the step before
                started = time.process_time()
                update(engine, model, optimizer, [batch], 1.0)
                between = time.process_time()
                engine.step(model, optimizer, 1.0)
                ended = time.process_time()
                if turn > 1 and i:
                    seconds["s", watched].append(between - started)
                    seconds["u", watched].append(ended - between)
            if monitor is not None:
                monitor.close()
    found = {key: statistics.median(values) for key, values in seconds.items()}
    return (found["s", False], found["s", True]), (found["u", False], found["u", True])
