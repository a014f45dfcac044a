"""Trainings with moments in 32, 16, 8 and 4 bits: the loss over seeds, beside that of float32 moments."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distopt
from benchmarks.arguments import COUNT, WIDTH
from distopt.data.order import Sequences
from distopt.data.text_data import TextData
from distopt.engine.train_step import next_token_loss
from distopt.models.language_model import LanguageModel, blocks

_BITS = (32, 16, 8, 4)
_OPTIMIZERS: dict[str, tuple[Any, float, dict[str, Any]]] = {  # the class, the weight decay, other options
    "adamw": (distopt.AdamW, 0.1, dict(lr=2e-3, betas=(0.9, 0.95))),
    "lamb": (distopt.LAMB, 0.01, dict(lr=2e-2)),
    "momentum": (distopt.SGD, 0.0, dict(lr=0.1, momentum=0.9)),
}


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks state`."""
    parser = benchmarks.add_parser("state", help="losses with moments in 32, 16, 8 and 4 bits")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lamb"], choices=list(_OPTIMIZERS))
    parser.add_argument("--bits", type=int, nargs="+", default=list(_BITS), choices=_BITS)
    parser.add_argument("--lr-factor", type=float, default=1.0, help="of the learning rates 2e-3, 2e-2 and 0.1")
    parser.add_argument("--seeds", type=COUNT, default=3)
    parser.add_argument("--steps", type=COUNT, default=1000)
    parser.add_argument("--layers", type=COUNT, default=2)
    parser.add_argument("--width", type=WIDTH, default=64, help="of the model, 32 for each head")
    parser.add_argument("--batch-size", type=COUNT, default=4)
    parser.add_argument("--sequence-length", type=COUNT, default=64)
    parser.add_argument("--json", type=Path, help="also write the losses of every run to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table with a row for each optimizer and number of bits."""
    torch.set_num_threads(1)
    corpus = TextData().build()
    marks = sorted({max(1, options.steps * part // 4) for part in (1, 2, 4)})
    print(f"torch {torch.__version__}, CPU; nats per token of validation, mean of {options.seeds} seeds (deviation)\n")
    print(
        f"| optimizer | bits | bytes | {' | '.join(f'step {mark}' for mark in marks)} | - float32, each seed | CPU s |"
    )
    print(f"|{'---|' * (5 + len(marks))}", flush=True)
    runs: dict[str, Any] = {}
    for name in options.optimizers:
        for bits in options.bits:
            trained = [train(name, bits, seed, marks, corpus, options) for seed in range(options.seeds)]
            runs[f"{name} {bits}"] = trained
            columns = [[each["losses"][i] for each in trained] for i in range(len(marks))]
            cells = [f"{statistics.mean(losses):.4f} ({statistics.pstdev(losses):.4f})" for losses in columns]
            exact = [each["losses"][-1] for each in runs.get(f"{name} 32", trained)]
            apart = ", ".join(f"{a - b:+.4f}" for a, b in zip(columns[-1], exact))
            seconds = statistics.mean(each["seconds"] for each in trained)
            print(
                f"| {name} | {bits} | {trained[0]['bytes']:.2f} | {' | '.join(cells)} | {apart} | {seconds:.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"torch": str(torch.__version__), "runs": runs}, indent=1) + "\n")


def train(
    name: str, bits: int, seed: int, marks: list[int], corpus: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once.

    Returns:
        losses: of validation after these numbers of steps. bytes: of the moments, for a parameter. seconds: of the CPU.
    """
    cls, decay, arguments = _OPTIMIZERS[name]
    model = _model(seed, options)
    arguments = {**arguments, "lr": options.lr_factor * arguments["lr"]}
    optimizer = cls(distopt.param_groups(model, decay), state_bits=bits, **arguments)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=max(1, options.steps // 20), total_steps=options.steps)
    size = dict(sequence_length=options.sequence_length, batch_size=options.batch_size)
    data, losses, started = Sequences(corpus.train, seed=seed, **size), [], time.process_time()
    for step in range(options.steps):
        optimizer.zero_grad()
        next_token_loss(model, data.batch(step, 0, 1)).backward()
        distopt.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        schedule.step()
        if step + 1 in marks:
            losses.append(_validation(model, corpus, options.sequence_length))
    seconds = time.process_time() - started
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    return {"losses": losses, "bytes": held / sum(p.numel() for p in model.parameters()), "seconds": seconds}


def _model(seed: int, options: argparse.Namespace) -> nn.Module:
    heads = options.width // 32
    sizes = dict(num_hidden_layers=options.layers, hidden_size=options.width, intermediate_size=3 * options.width)
    sizes |= dict(num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=options.sequence_length)
    made = LanguageModel("llama", {**sizes, "tie_word_embeddings": True}, seed=seed)
    model = made.empty(made.describe(256))
    for unit in (*blocks(model), model):
        made.fill(model, unit, torch.device("cpu"))
    return model


@torch.no_grad()
def _validation(model: nn.Module, corpus: Any, length: int) -> float:
    """Return the mean loss of the same 256 sequences, whatever was trained."""
    held = Sequences(corpus.validation, sequence_length=length, batch_size=64, seed=0)
    return statistics.mean(float(next_token_loss(model, held.batch(i, 0, 1))) for i in range(4))
