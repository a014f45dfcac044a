"""The runs below a folder: their metrics, their differences, and groups that differ by the seed only."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distopt.job.metrics import ALARMS, LAYERS, METRICS, RUN, read_lines, read_metrics
from distopt.report.checked import checked_choices, checked_layers, checked_rows, read_mapping

# Differences of these keys do not make two configurations different.
_NOT_COMPARED = ("name", "seed", "model.seed", "trackers", "train.resume")


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run's folder.

    Attributes:
        name: The folder, relative to the one that was searched.
        config: The configuration, by dotted keys.
        command: The command that starts the run, if it is known.
        choices: The group choices of the configuration.
        rows: The rows of metrics.jsonl.
        layers: The rows of layers.jsonl.
        alarms: The rows of alarms.jsonl.
    """

    name: str
    config: dict[str, Any]
    command: str
    choices: dict[str, str]
    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    alarms: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, root: Path) -> Run:
        """Read a folder that has a metrics.jsonl; other missing files are left empty.

        Raises:
            ValueError: For a file that a run has not written, with its name and what is wrong in it.
        """
        import yaml

        recorded = read_mapping(folder / RUN, json.loads)
        name = str(folder.relative_to(root)) if folder != root else folder.name
        return cls(
            name=name,
            config=dict(_flat(read_mapping(folder / "config.yaml", yaml.safe_load))),
            command=str(recorded.get("command", "")),
            choices=checked_choices(recorded.get("choices", {}), folder / RUN),
            rows=checked_rows(read_metrics(folder), folder / METRICS),
            layers=checked_layers(read_lines(folder / LAYERS), folder / LAYERS),
            alarms=read_lines(folder / ALARMS),
        )

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The row of each step, with the `seconds` of all steps so far."""
        rows, seconds, tokens = [], 0.0, 0
        for row in self.rows:
            if "loss" in row:
                seconds += (row["tokens"] - tokens) / row["tokens_per_second"] if row["tokens_per_second"] else 0.0
                tokens = row["tokens"]
                rows.append({**row, "seconds": seconds})
        return rows

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The row of each evaluation, with the tokens and seconds of the step before it."""
        done = {row["step"]: row for row in self.train}
        start = {"tokens": 0, "seconds": 0.0}
        return [
            {**row, **{key: done.get(row["step"], start)[key] for key in start}}
            for row in self.rows
            if "validation_loss" in row
        ]

    @property
    def diverged(self) -> bool:
        """Whether the last row is not finite; a run ends when its gradients are not finite."""
        last = (self.rows[-1].get(key, 0.0) for key in ("loss", "grad_norm", "validation_loss"))
        return not all(map(math.isfinite, last))

    @property
    def final(self) -> float:
        """The last validation loss, in nats per token; inf for a run that diverged, nan for one without."""
        return self._evaluated("validation_loss")

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss, in bits per byte of text."""
        return self._evaluated("bits_per_byte")

    @property
    def steps(self) -> int:
        """The number of steps."""
        return int(self.train[-1]["step"])

    @property
    def unfinished(self) -> bool:
        """Whether the configuration asks for more steps."""
        steps = self.config.get("train.steps", 0)
        return isinstance(steps, int) and self.steps < steps

    @property
    def tokens_per_second(self) -> float:
        """The throughput of all processes over all steps; nan if no time was measured."""
        last = self.train[-1]
        return last["tokens"] / last["seconds"] if last["seconds"] else math.nan

    @property
    def skipped(self) -> int:
        """The number of steps whose gradient was not finite."""
        return int(self.train[-1].get("skipped", 0))

    @property
    def lr(self) -> float:
        """The largest learning rate of the first param group."""
        return max((row["lr"] for row in self.train), default=math.nan)

    @property
    def optimizer(self) -> str:
        """The name in pictures: the optimizer of the configuration, and the member of the SAM family."""
        target = str(self.config.get("optimizer._target_", "")).rpartition(".")[2]
        sam = self.choices.get("sam", "off" if not self.config.get("sam._target_") else "sam")
        return self.choices.get("optimizer", target or "?") + ("" if sam == "off" else f", sam={sam}")

    def _evaluated(self, key: str) -> float:
        if self.diverged:
            return math.inf
        return float(self.validation[-1].get(key, math.nan)) if self.validation else math.nan


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by the seed only; its properties are medians over the runs.

    Attributes:
        label: The differences to the other groups, for a legend.
        differs: The values of the keys by which the groups differ.
        runs: The runs.
    """

    label: str
    differs: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The last validation loss, in nats per token."""
        return median(run.final for run in self.runs)

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss, in bits per byte of text."""
        return median(run.bits_per_byte for run in self.runs)

    @property
    def steps(self) -> float:
        """The number of steps."""
        return median(run.steps for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """The throughput of all processes over all steps."""
        return median(run.tokens_per_second for run in self.runs)

    @property
    def skipped(self) -> float:
        """The number of steps whose gradient was not finite."""
        return median(run.skipped for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest of the last validation losses; nan if there is none."""
        finals = [run.final for run in self.runs if not math.isnan(run.final)]
        return min(finals, default=math.nan), max(finals, default=math.nan)


def median(values: Iterable[float]) -> float:
    """Return the median of the measured values; nan, the value of an unmeasured one, if there are none."""
    return statistics.median([value for value in values if not math.isnan(value)] or [math.nan])


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the runs at or below a folder, by name, and a line about each that is damaged and left out.

    Raises:
        ValueError: If there is no such folder, or no run in it that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run, a sweep, or a folder of them")
    runs, damaged = [], []
    for file in sorted(folder.rglob(METRICS)):
        try:
            runs.append(Run.read(file.parent, folder))
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    runs = [run for run in runs if run.train]
    if not runs and damaged:
        raise ValueError(damaged[0])
    if not runs:
        raise ValueError(f"{folder} has no run that has trained a step ({METRICS}): give a folder of runs")
    return sorted(
        runs, key=lambda run: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", run.name)]
    ), damaged


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ by the seed only; the best median comes first, groups without one last."""
    keys = differing([run.config for run in runs])
    names = {run.optimizer for run in runs}
    # The names of the optimizers show the differences between them.
    vary = {name: differing([run.config for run in runs if run.optimizer == name]) for name in names}
    groups: dict[str, Group] = {}
    for run in runs:
        differs = {key: run.config.get(key) for key in keys}
        shown = (key for key in keys if key in ("optimizer.lr", "lr_scale") or key in vary[run.optimizer])
        label = ", ".join([run.optimizer, *(f"{_short(key)}={_value(differs[key])}" for key in shown)])
        if not run.config:
            label = run.name
        groups.setdefault(json.dumps([label, differs], default=str), Group(label, differs)).runs.append(run)
    return sorted(groups.values(), key=lambda group: (math.isnan(group.final), group.final))


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between the configurations."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if not key.startswith(_NOT_COMPARED) and len({json.dumps(c.get(key), default=str) for c in configs}) > 1
    ]


def _short(key: str) -> str:
    return "lr" if key == "optimizer.lr" else key.rpartition("._target_")[0] or key


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], config
