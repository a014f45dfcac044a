"""Whole training: tokens/s and memory of distopt on every sharded engine, compared with others at its stage."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import distopt
from benchmarks import gpt, peers
from benchmarks.arguments import COUNT, POSITIVE
from benchmarks.collectives import nbytes
from benchmarks.memory import Peak
from benchmarks.team import Team, TeamError
from distopt.data.text_data import TextData
from distopt.engine import FSDP2, DeepSpeed, Engine, Zero1
from distopt.engine.train_step import update

Made = tuple[peers.Step, Any]  # a training step, and the optimizer with the state


class Side(NamedTuple):
    """One way to train at a ZeRO stage.

    Attributes:
        stage: The ZeRO stage.
        ours: Whether it is distopt.
        make: Makes the training step.
    """

    stage: int
    ours: bool
    make: Callable[[torch.device, argparse.Namespace], Made]


def _ours(engine: Callable[[str], Engine], cls: Any, device: torch.device, options: argparse.Namespace) -> Made:
    """Return the step of `distopt.train`, and its optimizer."""
    made = engine(options.precision)
    model = gpt.build(made, device, options)
    if isinstance(made, DeepSpeed):
        peers.import_deepspeed()
    optimizer = cls(distopt.param_groups(made.unwrap(model), peers.WEIGHT_DECAY), lr=peers.LR)
    model = made.attach(model, optimizer, 1, peers.MAX_NORM)
    return lambda batch: update(made, model, optimizer, [batch], peers.MAX_NORM).loss, optimizer


def _zero2(precision: str) -> FSDP2:
    return FSDP2(precision, reshard_after_forward=False)


def _fsdp2(reshard: bool, device: torch.device, options: argparse.Namespace) -> Made:
    engine = peers.PlainFSDP2(options.precision, reshard_after_forward=reshard)
    return peers.torch_adamw(engine, device, options)


def _torch_fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=peers.LR, fused=True)


_ENGINES: list[tuple[int, str, Callable[[str], Engine]]] = [
    (1, "zero1", Zero1),
    (2, "zero2", _zero2),
    (3, "fsdp2", FSDP2),
    *[(stage, f"deepspeed_zero{stage}", partial(DeepSpeed, stage)) for stage in (1, 2, 3)],
]
SIDES: dict[str, Side] = {
    **{
        f"distopt {cls.__name__}, {name}": Side(stage, True, partial(_ours, engine, cls))
        for stage, name, engine in _ENGINES
        for cls in (distopt.AdamW, distopt.LAMB)
    },
    "DDP + ZeroRedundancyOptimizer": Side(1, False, peers.zero_redundancy),
    "FSDP2 + torch AdamW fused, no reshard": Side(2, False, partial(_fsdp2, False)),
    "FSDP2 + torch AdamW fused": Side(3, False, partial(_fsdp2, True)),
    **{
        f"DeepSpeed {stage} + {name}": Side(stage, False, partial(peers.deepspeed_loop, stage, make))
        for stage in (1, 2, 3)
        for name, make in (("its own Adam", peers.deepspeed_own), ("torch AdamW fused", _torch_fused))
    },
}


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks train`."""
    parser = benchmarks.add_parser("train", help="tokens/s and memory of training, compared with others by ZeRO stage")
    gpt.add_sizes(parser, layers=12, width=256, batch_size=4, sequence_length=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sides whose name contains one of these")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of all sides")
    parser.add_argument("--rounds", type=COUNT, default=9, help="number of turns of the sides of a stage")
    parser.add_argument("--steps", type=COUNT, default=2, help="steps in a turn")
    parser.add_argument("--timeout", type=POSITIVE, default=300.0, help="seconds for a side to start, and for a turn")
    parser.add_argument("--json", type=Path, help="also write the results to this file, after every turn")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a Markdown table, stage by stage, with a row for each side; sides that fail are listed with the reason.

    ZeRO's formula of the state is two float32 values per parameter, divided by the number of ranks; it is compared with
    the rank that has most. Every side has processes of its own, since DeepSpeed changes torch's functions in its
    process; those of a stage live at the same time and take turns. The first turn warms up.
    """
    gpt.check_batch(options)
    TextData().build()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPU cores"
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "where": where,
        "options": {name: value for name, value in vars(options).items() if isinstance(value, (int, str))},
        "formula": 8 * gpt.numel(options) / options.processes,
        "sides": {},
        "failed": {},
    }
    model = f"{gpt.numel(options) / 1e6:.1f}M parameters ({options.layers} layers of width {options.width})"
    batch = f"{options.batch_size} sequences of {options.sequence_length} tokens per step"
    turns = f"medians of {options.rounds} turns of {options.steps} steps"
    print(f"torch {torch.__version__}, {where}; {options.processes} processes, {model}, {batch}; {turns}\n")
    sizes = "peak, MiB per rank | state, MiB per rank | / ZeRO's formula"
    print(f"| stage | | tokens/s | / best peer | by processor time | {sizes} | loss |\n|{'---|' * 9}")
    for stage in options.stages:
        names = [n for n, s in SIDES.items() if s.stage == stage]
        chosen = [n for n in names if not options.only or any(part in n for part in options.only)]
        _stage(chosen, options, report)
        print("\n".join(_rows(stage, report)), flush=True)
    for name, reason in report["failed"].items():
        print(f"\n{name} has no row: {reason}")
    if not report["sides"]:
        raise SystemExit(1)


def _stage(names: list[str], options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure the sides of a stage in turns, and update the report after each."""
    teams: dict[str, Team] = {}

    def fail(name: str, error: TeamError) -> None:
        report["failed"][name] = str(error)
        report["sides"].pop(name, None)
        teams.pop(name, None)
        tqdm.write(f"{name}: {error}")

    try:
        for name in tqdm(names, desc="starting", leave=False):
            try:
                teams[name] = Team(options.processes, Training, name, options, seconds=options.timeout)
            except TeamError as error:
                fail(name, error)
        for turn in tqdm(range(options.rounds + 1), desc="turns", leave=False):
            order = list(teams)[turn % max(1, len(teams)) :] + list(teams)[: turn % max(1, len(teams))]
            for name in order:
                try:
                    answers = teams[name].call("turn", turn * options.steps, options.steps)
                    side = report["sides"].setdefault(
                        name, {"stage": SIDES[name].stage, "ours": SIDES[name].ours, "seconds": [], "cpu": []}
                    )
                    if turn:
                        side["seconds"].append(answers[0].pop("seconds"))
                        side["cpu"].append(statistics.mean(a["cpu"] for a in answers))
                    side.update({key: max(a[key] for a in answers) for key in ("peak", "state", "loss")})
                except TeamError as error:
                    fail(name, error)
            if options.json:
                _write(options.json, report)
    finally:
        for team in teams.values():
            team.stop()


def _rows(stage: int, report: Mapping[str, Any]) -> list[str]:
    sides = {name: side for name, side in report["sides"].items() if side["stage"] == stage and side["seconds"]}
    options = report["options"]
    tokens = options["batch_size"] * options["sequence_length"]
    rate = {name: tokens / statistics.median(side["seconds"]) for name, side in sides.items()}
    cpu = {name: statistics.median(side["cpu"]) for name, side in sides.items()}
    best = max((rate[name] for name, side in sides.items() if not side["ours"]), default=None)
    least = min((cpu[name] for name, side in sides.items() if not side["ours"]), default=None)
    return [
        f"| {stage} | {name} | {rate[name]:,.0f} | {f'{rate[name] / best:.3f}' if best else 'no peer'} | "
        f"{f'{least / cpu[name]:.3f}' if least else 'no peer'} | "
        f"{side['peak'] / 2**20:.1f} | {side['state'] / 2**20:.2f} | {side['state'] / report['formula']:.4f} | "
        f"{side['loss']:.4f} |"
        for name, side in sides.items()
    ]


def _write(file: Path, report: Mapping[str, Any]) -> None:
    """Write the file atomically."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(file)


class Training:
    """The model, the data and the optimizer of a side, on one rank."""

    def __init__(self, device: torch.device, name: str, options: argparse.Namespace) -> None:
        if "deepspeed" in name.lower():
            peers.import_deepspeed()  # before the memory is measured, which is not to include its code
        self.device, self.options = device, options
        self.sequences = gpt.sequences(options)
        self.peak = Peak(device)
        self.step, self.optimizer = SIDES[name].make(device, options)
        self.warm = False

    def turn(self, first: int, steps: int) -> dict[str, float]:
        """Train for a turn.

        Args:
            first: The index of the first step.
            steps: The number of steps.

        Returns:
            seconds, cpu: per step, of the clock and of the processor. peak: bytes of memory, from the second turn on.
            state: bytes of the optimizer state. loss: of the last step, the mean over the ranks.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = [self.sequences.batch(first + i, rank, world).to(self.device) for i in range(steps)]
        if first and not self.warm:
            self.peak.reset()
            self.warm = True
        self._wait()
        started, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            loss = self.step(batch)
        self._wait()
        seconds, cpu = (time.perf_counter() - started) / steps, (time.process_time() - cpu) / steps
        peak = self.peak.bytes()
        dist.all_reduce(loss)
        found = {"peak": peak, "state": state_bytes(self.optimizer), "loss": loss.item() / world}
        return {"seconds": seconds, "cpu": cpu, **found}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the local optimizer state: all buffers, without step counts."""
    buffers = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return nbytes(value for value in buffers if isinstance(value, torch.Tensor))
