"""SAM's perturbation after rounding to bfloat16: the effective perturbation, and the change of the gradient."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import distopt
from benchmarks.arguments import COUNT, COUNT_OR_NONE, WIDTH
from distopt.data.order import Sequences
from distopt.data.text_data import TextData
from distopt.engine.train_step import next_token_loss
from distopt.models.language_model import LanguageModel, blocks
from distopt.sam.rounding import perturb_

_RADII = (0.0005, 0.002, 0.005, 0.02, 0.05, 0.2)


def add_parser(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the options of `python -m benchmarks rounding`."""
    parser = benchmarks.add_parser("rounding", help="SAM's effective perturbation in bfloat16")
    parser.add_argument("--layers", type=COUNT, default=4)
    parser.add_argument("--width", type=WIDTH, default=256, help="of the model, 32 for each head")
    parser.add_argument("--steps", type=COUNT_OR_NONE, default=60, help="of AdamW before it is measured")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a Markdown table with a row for each radius and each way to round."""
    torch.manual_seed(0)
    sizes = {"n_layer": options.layers, "n_head": options.width // 32, "n_embd": options.width, "n_positions": 64}
    made = LanguageModel("gpt2", {**sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model = made.empty(made.describe(256))
    for unit in (*blocks(model), model):
        made.fill(model, unit, torch.device("cpu"))
    params = list(model.parameters())
    sequences = Sequences(TextData().build().train, sequence_length=64, batch_size=16)
    optimizer = distopt.AdamW(params, lr=1e-3)
    for step in range(options.steps):
        optimizer.zero_grad()
        next_token_loss(model, sequences.batch(step, 0, 1)).backward()
        optimizer.step()
    batch = sequences.batch(1000, 0, 1)  # a batch that was not trained on

    weights = [p.detach().clone() for p in params]
    low = [w.bfloat16() for w in weights]
    first, first_low = _gradient(model, weights, batch), _gradient(model, low, batch)
    print(f"{sum(p.numel() for p in params):,} parameters, after {options.steps} steps of AdamW\n")
    print("| rho | weights | length seen | share | cosine | gradient's change: share | cosine |")
    print(f"|{'---|' * 7}")
    for rho in _RADII:
        factor = torch.tensor(rho / float(torch.linalg.vector_norm(_flat(first))), dtype=torch.float64)
        meant = [g * factor.float() for g in first]
        exact = _difference(_gradient(model, [w + e for w, e in zip(weights, meant)], batch), first)
        dithered = [w.clone() for w in low]
        perturb_(dithered, first, [factor] * len(first))
        ways = {
            "float32, rounded in each pass": [(w + e).bfloat16() for w, e in zip(weights, meant)],
            "bfloat16, to the nearest": [(w + e).bfloat16() for w, e in zip(low, meant)],
            "bfloat16, as `SAM` does": dithered,
        }
        for name, moved in ways.items():
            seen = _difference(moved, low)
            change = _difference(_gradient(model, moved, batch), first_low)
            cells = [rho, name, f"{float(seen.norm()):.4f}", *_along(seen, _flat(meant)), *_along(change, exact)]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _gradient(model: nn.Module, weights: list[Tensor], batch: Tensor) -> list[Tensor]:
    """Return the gradient of the loss at these weights, computed in float32."""
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights):
            p.copy_(w)
    model.zero_grad()
    next_token_loss(model, batch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def _difference(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _flat(a) - _flat(b)


def _along(seen: Tensor, meant: Tensor) -> tuple[str, str]:
    """Return the projection of `seen` on `meant`, relative to `meant`, and the cosine of their angle."""
    product = float(seen @ meant)
    return f"{product / float(meant @ meant):.2f}", f"{product / float(seen.norm() * meant.norm()):.2f}"
