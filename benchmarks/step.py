"""The optimizer step alone: distopt's, torch's and other packages' on the same tensors, in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.arguments import COUNT
from benchmarks.contestants import BASE, CLIPPED_BASE, Make, clipping, contestants
from benchmarks.muons import split

Shapes = list[tuple[int, ...]]
_SMALL = 20_000_000  # elements: the matrices of fewer a CPU makes orthogonal within a second


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks step`."""
    parser = benchmarks.add_parser("step", help="time, bandwidth and memory of one optimizer step, against others")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="sets of tensors")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="optimizers whose name contains one of these")
    parser.add_argument("--rounds", type=COUNT, default=15, help="number of turns")
    parser.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="of the CPU; all if not given")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, on a machine that others use")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.set_defaults(run=run)


def gpt(layers: int, width: int, vocabulary: int, positions: int) -> Shapes:
    """Return the shapes of a GPT-2: tied embeddings, and twelve tensors per block."""
    weights = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    vectors = [(3 * width,), (width,), (4 * width,), *[(width,)] * 5]
    return [(vocabulary, width), (positions, width), *(weights + vectors) * layers, (width,), (width,)]


SHAPES: dict[str, Shapes] = {
    "gpt2_124m": gpt(12, 768, 50257, 1024),
    "gpt_d256": gpt(12, 256, 1024, 256),
    "1000_small": [(1000,)] * 1000,
    "one_50m": [(50_000_000,)],
}


def run(options: argparse.Namespace) -> None:
    """Print a table for each set of tensors."""
    _check(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, float32; medians of {options.rounds} rounds in turns")
    families = contestants(device.type == "cuda")
    base = families["adam"][BASE]
    if options.only:
        families = {
            family: {name: c for name, c in members.items() if any(part in name for part in options.only)}
            for family, members in families.items()
        }
        if not any(families.values()):
            raise SystemExit(f"--only {' '.join(options.only)}: no optimizer has that in its name")
    results: dict[str, dict[str, Any]] = {}
    for name in options.shapes:
        shapes = SHAPES[name]
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"\n{name}: {numel / 1e6:,.1f}M parameters in {len(shapes)} tensors", flush=True)
        results[name] = {}
        for family, members in families.items():
            if family == "matrices" and not _worth_it(name, bool(options.only) or device.type == "cuda"):
                continue
            if members:
                print(f"{name}: {family}, {len(members)} contestants ...", file=sys.stderr, flush=True)
                first = {CLIPPED_BASE: clipping()[CLIPPED_BASE]} if family == "clipping" else {BASE: base}
                clock = time.process_time if options.cpu_time else time.perf_counter
                results[name][family] = measure(shapes, {**first, **members}, device, options.rounds, clock)
        if results[name]:
            _print_table(results[name], numel)
    if options.json:
        options.json.write_text(json.dumps({"where": where, "torch": torch.__version__, **results}, indent=1) + "\n")


def _worth_it(name: str, wanted: bool) -> bool:
    """Return whether Muon takes part with these tensors; print why not, if they have matrices."""
    shapes = SHAPES[name]
    if not split([torch.empty(shape, device="meta") for shape in shapes]):
        return False
    if wanted or sum(torch.Size(shape).numel() for shape in shapes) < _SMALL:
        return True
    print(f"Muon does not take part: its step would take seconds here; --shapes {name} --only Muon measures it")
    return False


def _check(options: argparse.Namespace) -> None:
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.json and not options.json.parent.is_dir():
        raise SystemExit(f"--json {options.json}: there is no folder {options.json.parent}")


def _print_table(families: dict[str, Any], numel: int) -> None:
    print("| optimizer | ms | / fused AdamW | bytes per parameter | / copy | / in place | extra bytes per parameter |")
    print("|---|---|---|---|---|---|---|")
    for family, rows in families.items():
        base = CLIPPED_BASE if family == "clipping" else BASE
        for name, row in rows["steps"].items():
            rate = row["bytes"] * numel / row["seconds"]
            print(
                f"| {name} | {1e3 * row['seconds']:.2f} | {row['seconds'] / rows['steps'][base]['seconds']:.2f} | "
                f"{row['bytes']} | {rate / rows['copy']:.2f} | {rate / rows['in_place']:.2f} | "
                f"{row['extra'] / numel:.2f} |"
            )
    if "clipping" in families:
        print(f"Those that clip are compared with {CLIPPED_BASE}.")
    bandwidths = [f"{rows['copy'] / 1e9:.1f} / {rows['in_place'] / 1e9:.1f}" for rows in families.values()]
    print(f"GB/s of a copy / of scaling in place, family by family: {', '.join(bandwidths)}", flush=True)


def measure(
    shapes: Shapes,
    chosen: dict[str, tuple[int, Make]],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the step of each optimizer, all on the same weights and gradients.

    Args:
        shapes: The shapes of the tensors.
        chosen: The bytes per parameter and the constructor of each optimizer, by name.
        device: The device.
        rounds: The number of turns.
        clock: Returns the time in seconds.

    Returns:
        steps: by name, the median seconds, the bytes per parameter and the extra bytes of a step. copy, in_place: the
        bytes per second of a copy of the weights, and of their multiplication in place. The latter is closer to a step,
        which has read a cache line before it writes it, while a copy has to fetch the line that it writes.
    """
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, generator=generator, device=device).mul_(0.02).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device).mul_(0.01)
    source = torch.cat([p.detach().view(-1) for p in params])
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], Any]] = {name: make(params).step for name, (_, make) in chosen.items()}
    steps |= {"copy": lambda: target.copy_(source), "in_place": lambda: target.mul_(1.0)}
    extra = {}
    for name, step in steps.items():
        step()  # creates the state
        with memory.watched(device) as peak:
            step()
        extra[name] = peak[0]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            _wait(device)
            started = clock()
            steps[name]()
            _wait(device)
            seconds[name].append(clock() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    moved = 2 * source.numel() * source.element_size()
    return {
        "steps": {n: {"seconds": medians[n], "bytes": size, "extra": extra[n]} for n, (size, _) in chosen.items()},
        "copy": moved / medians["copy"],
        "in_place": moved / medians["in_place"],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
