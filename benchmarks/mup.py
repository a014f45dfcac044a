"""muP against the standard parametrization: activations over width, and the loss over learning rate and width."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence as Many
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import distopt
from distopt.data.order import Sequences
from distopt.data.text_data import TextData
from distopt.models.language_model import LanguageModel
from distopt.models.meta import base_shapes

_HEAD = 16
_KINDS = ("standard", "mup")


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks mup`."""
    parser = benchmarks.add_parser("mup", help="coordinate check and learning rates over width, standard and muP")
    parser.add_argument("--base-width", type=int, default=32)
    parser.add_argument("--check-widths", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--log2-lrs", type=int, nargs="*", default=[-11, -9, -7, -5, -3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rate, from unlike weights and batches")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of mup.json and the two pictures")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure both, print them as tables, and draw them."""
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "options": {k: v for k, v in vars(options).items() if k in _OWN},
    }
    seeds = [argparse.Namespace(**vars(options), seed=seed) for seed in range(options.seeds)]
    report["check"] = {kind: [_check(kind, width, seeds[0]) for width in options.check_widths] for kind in _KINDS}
    report["loss"] = {kind: {} for kind in _KINDS}
    runs = [(kind, width, exponent) for kind in _KINDS for width in options.widths for exponent in options.log2_lrs]
    for kind, width, exponent in tqdm(runs, leave=False):
        rates = report["loss"][kind].setdefault(str(width), [])
        rates.append([_loss(_train(kind, width, 2.0**exponent, options.steps, seed)[0]) for seed in seeds])
    (options.output / "mup.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report)
    _draw(report, options.output)


_OWN = ("base_width", "check_widths", "widths", "log2_lrs", "steps", "batch_size", "sequence_length", "seeds")


def made(kind: str, width: int, lr: float, options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a GPT-2 of two blocks and AdamW, by either parametrization; they are one at the base width."""
    sizes = {"n_layer": 2, "n_head": width // _HEAD, "n_embd": width, "n_positions": options.sequence_length}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    source = LanguageModel("gpt2", sizes | off)
    config = source.describe(256)
    model: nn.Module = source.empty(config).to_empty(device="cpu")
    # A model that is its own base has factors of 1: the standard parametrization.
    shapes = base_shapes(config, options.base_width if kind == "mup" else width)
    distopt.initialize(model, "mup", seed=options.seed, mup=shapes)
    groups = distopt.param_groups(model, 0.0, lr=lr, mup=shapes)
    return model, distopt.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _train(
    kind: str, width: int, lr: float, steps: int, options: argparse.Namespace, watch: Any = None
) -> tuple[list[float], nn.Module]:
    model, optimizer = made(kind, width, lr, options)
    data, losses = _sequences(options), []
    schedule = distopt.warmup_linear(optimizer, warmup_steps=steps // 10, total_steps=steps)
    for step in range(steps):
        tokens = data.batch(step, 0, 1)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = model(input_ids=inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if watch is not None:
            watch(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


def _sequences(options: argparse.Namespace) -> Sequences:
    size, batch = options.sequence_length, options.batch_size
    return Sequences(TextData().build().train, sequence_length=size, batch_size=batch, seed=options.seed)


def _loss(losses: Many[float]) -> float:
    """Return the mean of the last tenth of the steps."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def _outputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    output = model(input_ids=tokens, output_hidden_states=True)
    return {"last block": output.hidden_states[-2], "logits": output.logits}


def _check(kind: str, width: int, options: argparse.Namespace) -> dict[str, float]:
    """Return how much outputs have changed after four steps, as the root of the mean square, by name."""
    tokens = _sequences(options).batch(10**3, 0, 1)[:, :-1]
    start, _ = made(kind, width, 0.01, options)
    model = _train(kind, width, 0.01, 4, options)[1]
    before, after = _outputs(start, tokens), _outputs(model, tokens)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


def _print(report: dict[str, Any]) -> None:
    options = report["options"]
    print("change of the outputs in four steps\n\n| width | " + " | ".join(f"{k}: {n}" for k in _KINDS for n in _NAMES))
    print("|---|---|---|---|---|")
    for i, width in enumerate(options["check_widths"]):
        cells = [f"{report['check'][kind][i][name]:.3f}" for kind in _KINDS for name in _NAMES]
        print(f"| {width} | {' | '.join(cells)} |")
    print("\nloss\n\n| | width | " + " | ".join(f"2^{e}" for e in options["log2_lrs"]) + " |")
    print("|---|---|" + "---|" * len(options["log2_lrs"]))
    for kind in _KINDS:
        for width, rates in report["loss"][kind].items():
            cells = [f"{mean(losses):.3f} ± {_deviation(losses):.3f}" for losses in rates]
            cells[_best(rates)] = f"**{cells[_best(rates)]}**"
            print(f"| {kind} | {width} | " + " | ".join(cells) + " |")


def _deviation(losses: Many[float]) -> float:
    return stdev(losses) if len(losses) > 1 else 0.0


def _best(rates: Many[Many[float]]) -> int:
    return min(range(len(rates)), key=lambda rate: mean(rates[rate]))


_NAMES = ("last block", "logits")


def _draw(report: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = report["options"]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axis, name in zip(axes, _NAMES):
        for kind in _KINDS:
            axis.loglog(options["check_widths"], [row[name] for row in report["check"][kind]], "o-", label=kind)
        axis.set(title=f"{name}: change in 4 steps", xlabel="width", ylabel="root mean square")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "mup_coordinates.png", dpi=80)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axis, kind in zip(axes, _KINDS):
        for width, rates in report["loss"][kind].items():
            means, deviations = [mean(losses) for losses in rates], [_deviation(losses) for losses in rates]
            bars = axis.errorbar(options["log2_lrs"], means, deviations, fmt="o-", capsize=2, label=f"width {width}")
            best, color = _best(rates), bars.lines[0].get_color()
            axis.plot(options["log2_lrs"][best], means[best], "*", markersize=14, color=color)
        axis.set(title=kind, xlabel="log2 of the learning rate", ylabel=f"nats per token, step {options['steps']}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "mup_rates.png", dpi=80)
