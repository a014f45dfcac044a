"""The sharpness and the test score of small models with and without SAM, over several seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import distopt
from benchmarks import sharpness_tasks
from benchmarks.arguments import COUNT
from benchmarks.sharpness_tasks import Examples, Task, cross_entropy
from distopt.job.errors import one_line_errors
from distopt.sharpness import Objective, eigenvalues, noisy_loss

_TASKS = {"digits": sharpness_tasks.digits, "language": sharpness_tasks.language}
_LR, _WEIGHT_DECAY, _TUNING_SEED = 1e-3, 0.01, 1000


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        gradients: The number of gradients that a step computes.
        values: The values of the option that are tried.
        option: The name of the option.
        sam: The member of the SAM family, if it is one.
    """

    gradients: float
    values: tuple[float, ...]
    option: str
    sam: Callable[..., distopt.SAM] | None


_METHODS = {
    "AdamW": Method(1.0, (0.0, 0.1, 1.0, 10.0), "weight decay", None),
    "MomentumSAM": Method(1.0, (0.02, 0.1, 0.5, 2.0), "rho", distopt.MomentumSAM),
    "LookSAM": Method(1.2, (0.01, 0.05, 0.2, 1.0), "rho", distopt.LookSAM),
    "SAM": Method(2.0, (0.01, 0.05, 0.2, 1.0), "rho", distopt.SAM),
    "ASAM": Method(2.0, (0.1, 0.3, 1.0, 3.0), "rho", distopt.ASAM),
    "PreconditionedSAM": Method(2.0, (0.01, 0.05, 0.2, 1.0), "rho", distopt.PreconditionedSAM),
    "FunctionalSAM": Method(2.0, (0.01, 0.05, 0.2, 1.0), "rho", distopt.FunctionalSAM),
}


@dataclass(frozen=True)
class Result:
    """The measurements of one trained model; `seconds` is the process time of training."""

    score: float
    train_loss: float
    eigenvalue: float
    noisy_loss: float
    seconds: float


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks sharpness`."""
    parser = benchmarks.add_parser(
        "sharpness",
        help="sharpness and test score with and without SAM, at equal steps and at equal gradients, over seeds",
    )
    parser.add_argument("--tasks", nargs="+", default=list(_TASKS), choices=list(_TASKS), metavar="NAME")
    parser.add_argument("--only", nargs="+", default=list(_METHODS), choices=list(_METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=COUNT, default=5)
    parser.add_argument("--tuning-seeds", type=COUNT, default=2, help="additional seeds, for the choice of rho")
    parser.add_argument("--steps", type=COUNT, help="of a run; a run with SAM computes twice as many gradients")
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help="compare at equal time, not equal gradients",
    )
    parser.add_argument("--json", type=Path, default=Path("sharpness.json"), help="the file for all results")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Tune each method on validation examples, train it with all seeds, and print one Markdown table per task."""
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    with one_line_errors():
        tasks = [_TASKS[name](options.steps) for name in options.tasks]
    for task in tasks:
        names = [name for name in task.methods if name in options.only]
        # At equal steps; and at as many gradients as SAM computes, which is not equal time, or at equal time.
        as_long = _steps_in_equal_time if options.equal_time else _steps_at_equal_gradients
        plan = [(name, task.steps) for name in names]
        plan += [(name, as_long(task, name)) for name in names if _METHODS[name].gradients < 2]
        runs = {n: options.tuning_seeds * len(_METHODS[n].values) + options.seeds for n in names}
        total = sum(round(steps * _METHODS[name].gradients) * runs[name] for name, steps in plan)
        print(f"\n{_header(task)}", flush=True)
        base: list[Result] = []  # AdamW at equal steps
        with tqdm(total=total, desc=task.name, unit="gradients", leave=False) as bar:
            for name, steps in plan:
                value = _choose(task, name, steps, options.tuning_seeds, bar)
                results = [_measured(task, name, value, steps, seed, bar) for seed in range(options.seeds)]
                base = base or (results if name == "AdamW" else [])
                bar.clear()
                print(_row(name, steps, value, results, base), flush=True)
                common = {"task": task.name, "method": name, "steps": steps, _METHODS[name].option: value}
                records += [{**common, "seed": seed, **asdict(result)} for seed, result in enumerate(results)]
                options.json.write_text(json.dumps(records, indent=1) + "\n")


def _steps_at_equal_gradients(task: Task, name: str) -> int:
    return round(2 * task.steps / _METHODS[name].gradients)


def _steps_in_equal_time(task: Task, name: str) -> int:
    """Return the number of steps with the process time of SAM's steps."""
    return max(1, round(task.steps * _seconds(task, "SAM") / _seconds(task, name)))


def _seconds(task: Task, name: str, steps: int = 50) -> float:
    """Return the process time of steps (whole cycles of LookSAM), the shortest of three warm-ups."""
    times = []
    for _ in range(3):
        started = time.process_time()
        _trained(task, name, _METHODS[name].values[0], steps, _TUNING_SEED, tqdm(disable=True))
        times.append(time.process_time() - started)
    return min(times)


def _choose(task: Task, name: str, steps: int, seeds: int, bar: tqdm) -> float:
    """Return the value with the best mean score on the validation examples."""

    def score(value: float) -> float:
        scores = []
        for seed in range(_TUNING_SEED, _TUNING_SEED + seeds):
            _, validation = task.draw(seed)
            scores.append(_score(task, _trained(task, name, value, steps, seed, bar), validation))
        return statistics.mean(scores)

    return min(_METHODS[name].values, key=score)


def _trained(task: Task, name: str, value: float, steps: int, seed: int, bar: tqdm) -> nn.Module:
    method, model = _METHODS[name], task.model(seed)
    (inputs, classes), _ = task.draw(seed)
    groups = distopt.param_groups(model, _WEIGHT_DECAY if method.sam else value)
    optimizer: Any = distopt.AdamW(groups, lr=_LR)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=max(1, steps // 10), total_steps=steps)
    sam = method.sam(optimizer, rho=value) if method.sam else None
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * task.batch_size // len(inputs))
    order = torch.cat([torch.randperm(len(inputs), generator=generator) for _ in range(epochs)])
    for batch in order[: steps * task.batch_size].view(steps, -1):
        x, y = inputs[batch], classes[batch]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            logits = task.logits(model, x)
            loss = sam.loss(logits, lambda f: cross_entropy(f, y)) if sam else cross_entropy(logits, y)
            loss.backward()
            return loss

        (sam or optimizer).step(closure)
        schedule.step()
    bar.update(round(steps * method.gradients))
    return model


def _measured(task: Task, name: str, value: float, steps: int, seed: int, bar: tqdm) -> Result:
    started = time.process_time()
    model = _trained(task, name, value, steps, seed, bar)
    seconds = time.process_time() - started
    (x, y), _ = task.draw(seed)

    def loss(model: nn.Module, examples: Examples) -> Tensor:
        return cross_entropy(task.logits(model, examples[0]), examples[1])

    few = task.curvature_examples
    every, some = Objective(model, loss, [(x, y)]), Objective(model, loss, [(x[:few], y[:few])])
    top = eigenvalues(some, iterations=12, tolerance=0.0).values[0]
    noisy = noisy_loss(every, task.noise, 5).value
    return Result(_score(task, model, task.test), every.value(), top, noisy, seconds)


@torch.no_grad()
def _score(task: Task, model: nn.Module, examples: Examples) -> float:
    return task.score(task.logits(model, examples[0]), examples[1]).item()


def _header(task: Task) -> str:
    columns = ["", "steps", "option", task.score_name, "difference to AdamW", "training loss", "top eigenvalue"]
    columns += [f"training loss, noise {task.noise:.0%}", "CPU s"]
    return f"**{task.name}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _row(name: str, steps: int, value: float, results: list[Result], base: list[Result]) -> str:
    """Return a row of medians, minima and maxima over the seeds; differences to `base` are of equal seeds and data."""
    columns = {c: [getattr(r, c) for r in results] for c in ("train_loss", "eigenvalue", "noisy_loss")}
    differences = [r.score - b.score for r, b in zip(results, base)]
    cells = [name, str(steps), f"{_METHODS[name].option} {value:g}", _spread([r.score for r in results])]
    cells += [_spread(differences, "+.2g") if differences and results is not base else ""]
    cells += [_spread(column) for column in columns.values()]
    return f"| {' | '.join(cells)} | {statistics.median(r.seconds for r in results):.1f} |"


def _spread(values: list[float], digits: str = ".4g") -> str:
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
