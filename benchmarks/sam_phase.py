"""A SAM phase in mid-training: what a small Llama forgets by fine-tuning, and loses by four bits, over seeds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arguments import COUNT, POSITIVE
from benchmarks.phase_methods import METHODS, SIZES, Chosen, Method, Size
from benchmarks.phase_runs import Record, Runs, forget_checkpoints, loss_on, quantize
from benchmarks.phase_table import Row, table
from benchmarks.prose import write_readmes
from distopt.data.order import ValidationSequences
from distopt.data.text_data import TextData
from distopt.job.errors import one_line_errors
from distopt.job.job import Job

_SEED = 1000  # the first one, which the search uses too
_NEXT = 10_000  # what a phase adds to the seed: its batches are not those of the pretraining
_HELD_OUT = 0.1  # of the documents of the second domain
_READMES = Path("readmes.jsonl")
_SAME = ("trackers=[]", "evaluation.sample_tokens=0", "train.prove_every=0", "train.resume=auto", "checkpoint.keep=1")
# What is chosen, in this order: the option, the phase that it is tried with, the domain that decides, and the factor
# between two values.
_CHOICES = (
    ("tuning_lr", "AdamW", "second", 3.0),
    ("lr", "AdamW", "loss", 2.0),
    ("rho", "SAM", "loss", 3.0),
    ("preconditioned_rho", "PreconditionedSAM", "loss", 3.0),
)


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks sam_phase`."""
    parser = benchmarks.add_parser("sam_phase", help="forgetting and 4-bit loss after a phase with and without SAM")
    parser.add_argument("--size", default="0.4M", choices=list(SIZES), help="of the model, with its steps and batches")
    parser.add_argument("--path", type=Path, help="text of the second domain (default: READMEs of installed packages)")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=COUNT, default=3)
    for name in ("steps", "phase-steps", "tuning-steps", "batch-size", "sequence-length"):
        parser.add_argument(f"--{name}", type=COUNT, help="in place of that of the size")
    parser.add_argument("--sequences", type=COUNT, default=128, help="of each domain that a loss is measured on")
    for name in Chosen._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=POSITIVE, help="in place of a search")
    parser.add_argument("--output", type=Path, default=Path("sam_phase"), help="folder of runs, results and table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Choose learning rates and radii on the first seed, train every phase with all, and print one Markdown table.

    results.json in the folder has every finished run, and the same command goes on from there.
    """
    torch.set_num_threads(1)
    with one_line_errors(), tqdm(unit="gradients", leave=False) as bar:
        path = options.path and options.path.expanduser().absolute()
        options.output.mkdir(parents=True, exist_ok=True)
        os.chdir(options.output)  # so that no name in a command needs quotes
        size = SIZES[options.size].replaced(options)
        experiment = Experiment(size, path, options.sequences, bar)
        methods = [METHODS[name] for name in METHODS if name in options.only]
        chosen = experiment.choose(options, {method.radius for method in methods})
        base, rows = experiment.train(methods, chosen, range(_SEED, _SEED + options.seeds))
        experiment.runs.write(chosen=chosen._asdict())
        shown = table(size, chosen, base, rows)
        Path("table.md").write_text(shown)
        bar.clear()
        print(shown, end="")


class Experiment:
    """The runs of an experiment, each of which is trained when it is asked for.

    Args:
        size: The model, its steps and its batches.
        path: The text of the second domain; None for READMEs.
        sequences: The number of sequences of each domain that a loss is measured on.
        bar: Shows the gradients that are computed.
    """

    def __init__(self, size: Size, path: Path | None, sequences: int, bar: tqdm) -> None:
        self.size, self.bar, self._counted = size, bar, set[str]()
        if path is None and not _READMES.is_file():
            write_readmes(_READMES)
        text = str(path or _READMES)
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        self._second = ["data=text", f"data.path='{quoted}'", f"data.validation_fraction={_HELD_OUT}"]
        texts = TextData().build(), TextData(path=text, format="ending", validation_fraction=_HELD_OUT).build()
        sizes = {"sequence_length": size.sequence_length, "batch_size": size.batch_size, "max_sequences": sequences}
        self._held_out = [ValidationSequences(each.validation, **sizes) for each in texts]
        domains = {f"{name} domain": each.digest[:16] for name, each in zip(("first", "second"), texts)}
        self.runs = Runs(Path("results.json"), size._asdict() | {"sequences": sequences} | domains)

    def train(
        self, methods: Collection[Method], chosen: Chosen, seeds: Collection[int]
    ) -> tuple[list[Record], dict[str, Row]]:
        """Return the records of the pretrained models by seed, and those of each phase by its name."""
        self._counted.clear()
        self.bar.reset(total=len(seeds) * self.gradients(methods))
        base, rows = list[Record](), {method.name: Row([], []) for method in methods}
        for seed in seeds:
            self.bar.set_description(f"seed {seed}")
            base.append(self.pretrained(seed))
            for method in methods:
                self.bar.set_description(f"seed {seed}, {method.label}")
                rows[method.name].tuned.append(self.fine_tuned(seed, method, chosen))
                rows[method.name].phases.append(self.phase(seed, method, chosen))
        return base, rows

    def pretrained(self, seed: int) -> Record:
        """Return the losses of the pretrained model."""
        warmup = ["schedule=warmup_constant", f"schedule.warmup_steps={self.size.steps // 20}", f"seed={seed}"]
        warmup.append(self.size.groups())
        return self._get(_name(seed), self.size.steps, self.size.lr, warmup, self._of_base)

    def phase(self, seed: int, method: Method, chosen: Chosen) -> Record:
        """Return the losses after a phase."""
        self.pretrained(seed)
        words = ["schedule=warmup_linear", "schedule.warmup_steps=0", f"seed={seed + _NEXT}"]
        words += [f"train.init=runs/{_name(seed)}", *method.words(chosen, self.size)]
        steps = method.factor * self.size.phase_steps
        return self._get(_name(seed, method, chosen), steps, chosen.lr, words, self._of_base, method.passes)

    def fine_tuned(self, seed: int, method: Method, chosen: Chosen) -> Record:
        """Return the losses on both domains after a phase and fine-tuning on the second domain."""
        self.phase(seed, method, chosen)
        before, steps = _name(seed, method, chosen), self.size.tuning_steps
        words = ["schedule=warmup_linear", f"schedule.warmup_steps={steps // 10}", f"seed={seed}", *self._second]
        words += [f"train.init=runs/{before}", "train.init_state=false"]
        name = f"{before}-tuned{chosen.tuning_lr:g}"
        record = self._get(name, steps, chosen.tuning_lr, words, self._of_both)
        forget_checkpoints(name)
        return record

    def gradients(self, methods: Collection[Method]) -> int:
        """Return the number of gradients of one seed."""
        phases = sum(method.factor * method.passes for method in methods) * self.size.phase_steps
        return self.size.steps + phases + len(methods) * self.size.tuning_steps

    def choose(self, given: argparse.Namespace, radii: set[str | None]) -> Chosen:
        """Return learning rates and radii: those given, and for the others the best of a search on the first seed.

        The rate of the fine-tuning is the best for the second domain after a phase of AdamW. Rate and radius of a phase
        are the best for the first domain after that fine-tuning.

        Args:
            given: The command line.
            radii: The names of the radii that are needed.
        """
        chosen = Chosen(tuning_lr=self.size.lr / 2, lr=self.size.lr, rho=0.1, preconditioned_rho=0.1)
        for option, name, domain, factor in _CHOICES:
            value = getattr(given, option)
            if value is None and (option in radii or option.endswith("lr")):
                self.bar.set_description(f"choosing {option.replace('_', ' ')}")
                score = partial(self._score, METHODS[name], chosen, option, domain)
                value = best(score, getattr(chosen, option), factor)
            chosen = chosen if value is None else chosen._replace(**{option: value})
        return chosen

    def _score(self, method: Method, chosen: Chosen, option: str, domain: str, value: float) -> float:
        """Return the loss on a domain after fine-tuning, with another value of an option."""
        loss: float = self.fine_tuned(_SEED, method, chosen._replace(**{option: value}))[domain]
        return loss

    def _get(
        self, name: str, steps: int, lr: float, words: list[str], measure: Callable[[Job], Record], passes: int = 1
    ) -> Record:
        """Return the record of a run, and count its gradients once, whether it was trained now or before."""
        before = self.bar.n
        command = [*_SAME, *self.size.words(steps, lr), *words]
        record = self.runs.get(name, command, measure, lambda: self.bar.update(passes))
        if name not in self._counted:
            self.bar.update(before + steps * passes - self.bar.n)
            self._counted.add(name)
        return record

    def _of_base(self, job: Job) -> Record:
        model = job.engine.unwrap(job.model)
        parameters, loss = sum(p.numel() for p in model.parameters()), loss_on(job, self._held_out[0])
        quantize(model)
        return {"parameters": parameters, "loss": loss, "quantized": loss_on(job, self._held_out[0])}

    def _of_both(self, job: Job) -> Record:
        first, second = self._held_out
        return {"loss": loss_on(job, first), "second": loss_on(job, second)}


def best(score: Callable[[float], float], start: float, factor: float, most: int = 4) -> float:
    """Return the value with the least score, of three around a start and further ones while the best is at an end.

    Args:
        score: The score of a value.
        start: The middle of the first three values.
        factor: The factor between two values, which have two digits.
        most: The largest number of values to try.
    """
    scores: dict[float, float] = {}
    further = [start / factor, start, start * factor]
    while True:
        for value in [float(f"{each:.2g}") for each in further]:
            scores[value] = score(value)
        value = min(scores, key=lambda each: scores[each])
        if value not in (min(scores), max(scores)) or len(scores) >= most:
            return value
        further = [value / factor if value == min(scores) else value * factor]


def _name(seed: int, method: Method | None = None, chosen: Chosen | None = None) -> str:
    if method is None or chosen is None:
        return f"seed{seed}"
    return f"seed{seed}-{method.name}-{method.option(chosen)}"
