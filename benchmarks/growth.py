"""The growth of the cost of an optimizer step with parameters, with tensors and with ranks."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import distopt
from benchmarks import memory
from benchmarks.arguments import COUNT, POSITIVE
from benchmarks.collectives import Collectives
from benchmarks.team import Team, TeamError

_ADAMW: dict[str, Any] = dict(lr=1e-4, weight_decay=0.01)
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, **_ADAMW),
    "distopt AdamW": lambda p: distopt.AdamW(p, **_ADAMW),
    "distopt LAMB": lambda p: distopt.LAMB(p, **_ADAMW),
}


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks growth`."""
    parser = benchmarks.add_parser("growth", help="time of a step by parameters, tensors and ranks, with plots")
    parser.add_argument("--processes", type=COUNT, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument(
        "--millions", type=POSITIVE, nargs="+", default=[1, 4, 16, 64, 200, 400], metavar="M", help="of parameters"
    )
    parser.add_argument("--tensors", type=COUNT, nargs="+", default=[100, 1000, 3000], metavar="T")
    parser.add_argument("--fixed-tensors", type=COUNT, default=100, help="where parameters grow")
    parser.add_argument("--fixed-millions", type=POSITIVE, default=20, help="of parameters, where tensors grow")
    parser.add_argument("--rounds", type=COUNT, default=7, help="number of turns of the optimizers")
    parser.add_argument("--timeout", type=POSITIVE, default=180.0, help="seconds that one measurement may take")
    parser.add_argument("--json", type=Path, help="also write the results to this file, after every measurement")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw growth_*.png there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a Markdown table; measurements that fail, or do not fit into memory, are listed with the reason.

    The parameters are float32 and laid out as FSDP2 leaves them: each tensor is a DTensor sharded along its first
    dimension. All tensors have the same size. The collectives are those of clipping by the global norm and of the step.
    """
    points = [
        *[("parameters", world, m, options.fixed_tensors) for world in options.processes for m in options.millions],
        *[("tensors", world, options.fixed_millions, t) for world in options.processes for t in options.tensors],
    ]
    report: dict[str, Any] = {"torch": torch.__version__, "rounds": options.rounds, "points": [], "failed": []}
    names = list(OPTIMIZERS)
    print(f"torch {torch.__version__}; ms of a step, medians of {options.rounds} rounds in turns\n")
    print(
        f"| ranks | parameters | tensors | {' | '.join(names)} | ns per parameter: {' | '.join(names)} | "
        f"collectives: {' | '.join(names)} |"
    )
    print("|" + "---|" * (3 + 3 * len(names)))
    try:
        for grows, world, millions, tensors in tqdm(points, leave=False):
            size = max(1, round(millions * 1e6 / tensors))
            point = {"grows": grows, "ranks": world, "parameters": size * tensors, "tensors": tensors}
            try:
                point |= _measured(world, size, tensors, options)
                report["points"].append(point)
                tqdm.write(_row(point))
            except TeamError as error:
                report["failed"].append(point | {"reason": str(error)})
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    finally:  # also after an interrupt
        if options.plots and report["points"]:
            _plot(report["points"], options.plots)
    for point in report["failed"]:
        what = f"{point['parameters']:,} parameters in {point['tensors']:,} tensors"
        print(f"\n{point['ranks']} ranks, {what}: no row: {point['reason']}")
    if not report["points"]:
        raise SystemExit(1)


def _measured(world: int, size: int, tensors: int, options: argparse.Namespace) -> dict[str, Any]:
    # Weights, gradients and two moments; 256 MiB for the interpreter of each rank.
    needed, free = 16 * size * tensors + world * 2**28, memory.available()
    if free and needed > free and not torch.cuda.is_available():
        raise TeamError(f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free")
    team = Team(world, Steps, size, tensors, seconds=options.timeout)
    try:
        answers = team.call("measure", options.rounds)
        seconds = {
            name: [max(a["seconds"][name][i] for a in answers) for i in range(options.rounds)] for name in OPTIMIZERS
        }
        return {"seconds": seconds, "collectives": answers[0]["collectives"]}
    finally:
        team.stop()


class Steps:
    """The optimizers of a rank, over the same parameters, gradients and state."""

    def __init__(self, device: torch.device, size: int, tensors: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        rows = torch.empty(size, device="meta").chunk(mesh.size())
        local = rows[mesh.get_rank()].numel() if mesh.get_rank() < len(rows) else 0

        def drawn(scale: float) -> DTensor:
            part = torch.empty(local, device=device).uniform_(-scale, scale)
            return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size([size]), stride=(1,))

        self.device = device
        self.params = [nn.Parameter(drawn(0.05)) for _ in range(tensors)]
        for p in self.params:
            p.grad = drawn(0.01)
        self.optimizers = {name: make(self.params) for name, make in OPTIMIZERS.items()}
        # They share the two moments, so that the memory is that of one optimizer: 16 bytes per parameter.
        moments = {p: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in self.params}
        for name, optimizer in self.optimizers.items():
            for p in self.params:
                place = device if name.startswith("torch") else torch.device("cpu")
                optimizer.state[p] = {"step": torch.zeros((), device=place), **moments[p]}

    def measure(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Return the seconds of the step of each round, and the collectives of a step with clipping, by optimizer."""
        collectives = {}
        for name, optimizer in self.optimizers.items():
            optimizer.step()
            with Collectives() as mode:
                distopt.clip_grad_norm_(optimizer, 1.0)
                optimizer.step()
            collectives[name] = len(mode.seen)
        seconds: dict[str, list[float]] = {name: [] for name in self.optimizers}
        names = list(self.optimizers)
        for turn in range(rounds):
            for name in names if turn % 2 else reversed(names):
                self._wait()
                started = time.perf_counter()
                self.optimizers[name].step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - started)
        return {"seconds": seconds, "collectives": collectives}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def _row(point: dict[str, Any]) -> str:
    medians = [statistics.median(point["seconds"][name]) for name in OPTIMIZERS]
    cells = [
        f"{point['ranks']}",
        f"{point['parameters'] / 1e6:g}M",
        f"{point['tensors']:,}",
        *[f"{1e3 * s:.2f}" for s in medians],
        *[f"{1e9 * s / point['parameters']:.2f}" for s in medians],
        *[f"{point['collectives'][name]}" for name in OPTIMIZERS],
    ]
    return f"| {' | '.join(cells)} |"


def _plot(points: list[dict[str, Any]], folder: Path) -> None:
    """Draw the time by parameters, by tensors, and, for the largest model that all world sizes share, by ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for by in ("parameters", "tensors"):
        worlds = sorted({point["ranks"] for point in points if point["grows"] == by})
        if not worlds:
            continue
        figure, axes = pyplot.subplots(1, len(worlds), figsize=(4 * len(worlds), 3.6), sharey=True, squeeze=False)
        for axis, world in zip(axes[0], worlds):
            chosen = [p for p in points if p["grows"] == by and p["ranks"] == world]
            _lines(axis, chosen, by)
            axis.set(xscale="log", yscale="log", xlabel=by, title=f"{world} rank{'s' * (world > 1)}")
        axes[0][0].set_ylabel("ms per step")
        axes[0][0].legend()
        _save(figure, folder / f"growth_{by}.png")
    chosen = [p for p in points if p["grows"] == "parameters"]
    worlds = sorted({p["ranks"] for p in chosen})
    shared = [
        n for n in {p["parameters"] for p in chosen} if len([p for p in chosen if p["parameters"] == n]) == len(worlds)
    ]
    if not shared:
        return
    chosen = [p for p in chosen if p["parameters"] == max(shared)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.6))
    _lines(left, chosen, "ranks")
    left.set(xlabel="ranks", ylabel="ms per step", title=f"{max(shared) / 1e6:g}M parameters", xticks=worlds, ylim=0)
    for i, name in enumerate(OPTIMIZERS):
        counts = [p["collectives"][name] for p in chosen]
        right.bar([j + 0.25 * (i - 1) for j in range(len(chosen))], counts, 0.25, label=name)
    right.set(xlabel="ranks", ylabel="collectives, clipping and step", xticks=range(len(chosen)))
    right.yaxis.get_major_locator().set_params(integer=True)
    right.set_xticklabels([p["ranks"] for p in chosen])
    left.legend()
    _save(figure, folder / "growth_ranks.png")


def _lines(axis: Any, points: list[dict[str, Any]], by: str) -> None:
    points = sorted(points, key=lambda point: point[by])
    for name in OPTIMIZERS:
        medians = [1e3 * statistics.median(point["seconds"][name]) for point in points]
        axis.plot([point[by] for point in points], medians, marker="o", label=name)
    axis.grid(alpha=0.3)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    figure.clear()
