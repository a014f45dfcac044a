"""The runs of `python -m benchmarks sam_phase`: jobs of `distopt.train`, each measured once."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from distopt.data.order import ValidationSequences
from distopt.job import cli
from distopt.job.build import build
from distopt.job.config import Config
from distopt.job.errors import one_line_errors
from distopt.job.evaluate import validation_loss
from distopt.job.job import Job
from distopt.job.terminal import Terminal

GROUP, LEVELS = 32, 7  # weights that share a scale, and the levels on either side of 0: 15 of the 16 of four bits
Record = dict[str, Any]


class Runs:
    """The measurements of runs by name, in a file; a run that is there is not trained again.

    Args:
        file: The JSON file.
        settings: The options that all of its runs have in common.

    Attributes:
        records: What was measured, by the name of the run.

    Raises:
        ValueError: If the file has runs with other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, dict(settings)
        self.records: dict[str, Record] = {}
        if not file.is_file():
            self.write()  # before the first run, which may be interrupted
            return
        found = json.loads(file.read_text())
        for name, now in self.settings.items():
            if (before := found["settings"].get(name)) != now:
                raise ValueError(
                    f"{file.resolve()} has runs with {name} {before}, now it is {now}: give another --output"
                )
        self.records = found["runs"]

    def get(
        self, name: str, words: Iterable[str], measure: Callable[[Job], Record], stepped: Callable[[], None]
    ) -> Record:
        """Return what was measured of a run, which is trained, or resumed, unless it is known.

        Args:
            name: The name of the run, whose folder is `runs/NAME` in the current one.
            words: The words of its command.
            measure: Measures the trained model, whose weights it may change.
            stepped: Called after every step.

        Returns:
            What `measure` returned, with `seconds`, the median time of a step: processor time on a CPU.
        """
        if name not in self.records:
            found = train([f"name={name}", *words], measure, stepped)
            self.records[name] = found | {"words": [*words]}
            self.write()
        return self.records[name]

    def write(self, **more: Any) -> None:
        """Write the file, complete or not at all."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, **more, "runs": self.records}, indent=1) + "\n")
        part.replace(self.file)


def train(words: list[str], measure: Callable[[Job], Record], stepped: Callable[[], None]) -> Record:
    """Run `distopt.train` with a command of these words, without its output, and measure the model that it leaves."""
    found: Record = {}

    @cli.program("train")
    def job(cfg: Config) -> None:
        with one_line_errors(), Terminal(main=False) as terminal:  # in here: Hydra prints the words of what raises
            built = build(cfg, terminal)
            seconds = _watch(built, stepped)
            built.run()
        found.update(measure(built), seconds=statistics.median(seconds) if seconds else None)

    with mock.patch.object(sys, "argv", ["distopt.train", *words]), cli.explained():
        job()
    return found


def _watch(job: Job, stepped: Callable[[], None]) -> list[float]:
    """Have a job note the time of each step; returns the list, which grows while it runs."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: list[float] = []
    step = job.train_step

    def timed(*args: Any) -> Any:
        began = clock()
        done = step(*args)
        seconds.append(clock() - began)
        stepped()
        return done

    job.train_step = timed  # type: ignore[method-assign, assignment]
    return seconds


def loss_on(job: Job, sequences: ValidationSequences) -> float:
    """Return the mean loss of a job's model in nats per byte."""
    batches: Iterable[Tensor] = sequences.batches()
    return float(validation_loss(job.engine, job.model, batches, job.accelerator.device))


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Round the weights of a model's linear layers, except the output layer, to four bits.

        w <- s round(w / s)        s = max |w| / 7, of each group of 32 weights along a row

    Raises:
        ValueError: If a row is not a multiple of 32.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]  # a model of transformers
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is output:
            continue
        if module.in_features % GROUP:
            raise ValueError(f"{name} has rows of {module.in_features} weights, which is not a multiple of {GROUP}")
        groups = module.weight.view(-1, GROUP)
        scales = groups.abs().amax(1, keepdim=True).clamp_min(torch.finfo(groups.dtype).tiny) / LEVELS
        groups.copy_((groups / scales).round() * scales)


def forget_checkpoints(name: str) -> None:
    """Remove the checkpoints of a run that no other starts from."""
    shutil.rmtree(Path("runs", name, "checkpoints"), ignore_errors=True)
