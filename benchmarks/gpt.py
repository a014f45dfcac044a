"""The model and the text of the benchmarks: a GPT-2 over bytes, with the sizes of the command line."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.arguments import COUNT, WIDTH
from distopt.data.order import Sequences
from distopt.data.text_data import TextData
from distopt.engine import Engine
from distopt.models.language_model import LanguageModel, blocks


def add_sizes(parser: argparse.ArgumentParser, layers: int, width: int, batch_size: int, sequence_length: int) -> None:
    """Add the options of model and batch, with these defaults."""
    parser.add_argument("--processes", type=COUNT, default=torch.cuda.device_count() or 2)
    parser.add_argument("--layers", type=COUNT, default=layers)
    parser.add_argument("--width", type=WIDTH, default=width, help="of the model, 32 for each head")
    parser.add_argument("--batch-size", type=COUNT, default=batch_size, help="sequences a step, over all processes")
    parser.add_argument("--sequence-length", type=COUNT, default=sequence_length)


def check_batch(options: argparse.Namespace) -> None:
    """Raise `SystemExit` unless every rank gets as many sequences."""
    if options.batch_size % options.processes:
        raise SystemExit(
            f"--batch-size {options.batch_size} is not a multiple of --processes {options.processes}: every rank "
            "trains on as many sequences"
        )


def build(engine: Engine, device: torch.device, options: argparse.Namespace) -> nn.Module:
    """Return the model as the engine wraps it; its initial weights are the same on every engine."""
    made = _language_model(options)
    model = made.empty(made.describe(256))
    return engine.build(model, blocks(model), lambda unit, place: made.fill(model, unit, place), device)


def sequences(options: argparse.Namespace) -> Sequences:
    """Return the training batches; the text is tokenized unless the cache has it."""
    tokens = TextData().build().train
    return Sequences(tokens, sequence_length=options.sequence_length, batch_size=options.batch_size)


def numel(options: argparse.Namespace) -> int:
    """Return the number of parameters of the model."""
    made = _language_model(options)
    return sum(p.numel() for p in made.empty(made.describe(256)).parameters())


def _language_model(options: argparse.Namespace) -> LanguageModel:
    sizes = {"n_layer": options.layers, "n_head": options.width // 32, "n_embd": options.width}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return LanguageModel("gpt2", {**sizes, **dropout, "n_positions": options.sequence_length})
