"""What grows with the scale of a job, each as a picture: ranks, tensors, experts, and the vocabulary.

Ranks are those of a process group that sends nothing: the time is that of one process, in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import checkpoint, host
from benchmarks.arguments import COUNT

_STEPS = {
    "distopt clip + AdamW": "distopt AdamW",
    "distopt clip + LAMB": "distopt LAMB",
    "torch clip + AdamW fused": "torch AdamW fused",
}
_RANKS_OF_TENSORS, _RANKS_OF_EXPERTS = 512, 512
_BLOCKS_OF_TORCH = 100  # torch 2.13's fused AdamW takes 40 s for its first step of 3,000 DTensors; by their square
_TOKENS, _HIDDEN = 8192, 512  # of the model whose vocabulary grows


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks scale`."""
    parser = benchmarks.add_parser("scale", help="step, save and memory by ranks, tensors, experts and vocabulary")
    parser.add_argument("--ranks", type=COUNT, nargs="+", default=[1, 8, 64, 512, 4096], metavar="N")
    parser.add_argument(
        "--blocks", type=COUNT, nargs="+", default=[11, 80, 333, 1111], metavar="B", help="of 9 tensors"
    )
    parser.add_argument("--experts", type=COUNT, nargs="+", default=[8, 32, 64, 128, 256], metavar="E")
    parser.add_argument(
        "--vocabularies", type=COUNT, nargs="+", default=[32, 64, 128, 256], metavar="K", help="in 1,024"
    )
    parser.add_argument("--rounds", type=COUNT, default=9, help="number of turns")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw scale.png there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table for each picture."""
    pictures: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
        "ranks": ("ms of a step with clipping, 723 tensors", [(by_ranks, n, options.rounds) for n in options.ranks]),
        "tensors": (
            f"ms of a step with clipping, {_RANKS_OF_TENSORS} ranks",
            [(by_tensors, n, options.rounds) for n in options.blocks],
        ),
        "saves": ("CPU s of rank 0 in the second save, Llama-70B", [(by_saves, n) for n in options.ranks]),
        "experts": (
            f"largest shard / an equal one, {_RANKS_OF_EXPERTS} ranks",
            [(by_experts, n) for n in options.experts],
        ),
        "vocabulary": (
            f"GiB of activations, {_TOKENS:,} tokens",
            [(by_vocabulary, 1024 * n) for n in options.vocabularies],
        ),
    }
    found: dict[str, Any] = {}
    total = sum(len(calls) for _, calls in pictures.values())
    with tqdm(total=total, leave=False) as bar:
        for name, (what, calls) in pictures.items():
            points = []
            for call in calls:
                points.append(_alone(*call))
                bar.update()
            found[name] = {"what": what, "points": points}
            tqdm.write(_table(name, what, points))
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plots:
        _plot(found, options.plots)


def by_ranks(ranks: int, rounds: int) -> tuple[int, dict[str, float]]:
    """Return the milliseconds of steps with clipping."""
    _, seconds = host.measure(ranks, rounds, only=tuple(_STEPS))
    return ranks, {_STEPS[name]: 1e3 * taken for name, taken in seconds.items()}


def by_tensors(blocks: int, rounds: int) -> tuple[int, dict[str, float]]:
    """Return the number of tensors, and the milliseconds of steps with clipping."""
    only = tuple(name for name in _STEPS if blocks <= _BLOCKS_OF_TORCH or not name.startswith("torch"))
    tensors, seconds = host.measure(_RANKS_OF_TENSORS, rounds, blocks, only)
    return tensors, {_STEPS[name]: 1e3 * taken for name, taken in seconds.items()}


def by_saves(ranks: int) -> tuple[int, dict[str, float]]:
    """Return the seconds of the second save, which the first has planned."""
    *_, (seconds, _) = checkpoint.measure(ranks, columns=2, saves=2)
    return ranks, {"save_checkpoint": seconds}


def by_experts(experts: int) -> tuple[int, dict[str, float]]:
    """Return the padding of the stacked experts of a block of Qwen3-30B-A3B's sizes."""
    from distopt.plan.footprint import Param, numel, rows, shards

    params = [Param((experts, 1536, 2048), True, 2), Param((experts, 2048, 768), True, 2)]
    even = numel(params) / _RANKS_OF_EXPERTS
    by_rows = rows(params, _RANKS_OF_EXPERTS)
    return experts, {"engine=fsdp2": shards(params, _RANKS_OF_EXPERTS) / even, "by rows": by_rows / even}


def by_vocabulary(tokens: int) -> tuple[int, dict[str, float]]:
    """Return the peak of the activations of a small Llama in a rehearsal, with and without chunks of the loss."""
    import distopt
    from distopt.engine import FSDP2
    from distopt.models.language_model import LanguageModel
    from distopt.plan.rehearsal import rehearse

    sizes = dict(num_hidden_layers=2, hidden_size=_HIDDEN, intermediate_size=2 * _HIDDEN, num_attention_heads=8)
    config = {**sizes, "max_position_embeddings": _TOKENS}
    gib = {}
    for name, chunked in (("model.chunked_loss=true", True), ("all logits at once", False)):
        language_model = LanguageModel("llama", config, chunked_loss=chunked)
        found = rehearse(FSDP2("bf16"), language_model, distopt.param_groups, distopt.AdamW, tokens, 1, _TOKENS)
        gib[name] = found.activations / 2**30
    return tokens, gib


def _alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Measure in a process of its own, whose process group and caches nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _table(name: str, what: str, points: Sequence[tuple[int, dict[str, float]]]) -> str:
    names = list(points[0][1])
    lines = [f"\n{what}\n", f"| {name} | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
    for at, value in points:
        lines.append(f"| {at:,} | {' | '.join(f'{value[key]:.2f}' if key in value else '' for key in names)} |")
    return "\n".join(lines)


def _plot(found: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7))
    for axis, (name, picture) in zip(axes.flat, found.items()):
        points = picture["points"]
        for key in points[0][1]:
            known = [(at, value[key]) for at, value in points if key in value]
            axis.plot(*zip(*known), marker="o", label=key)
        axis.set(xscale="log", xlabel="ranks" if name == "saves" else name, title=picture["what"], ylim=0)
        axis.title.set_fontsize(10)
        axis.set_xticks([at for at, _ in points], [f"{at:,}" for at, _ in points], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes.flat[-1].set_axis_off()
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / "scale.png", dpi=120)
