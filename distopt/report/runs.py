"""The runs below a folder: what they measured, how they differ, which of them are alike but for the seed."""

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

from distopt.job.metrics import LAYERS, METRICS, RUN, read_lines, read_metrics

# What differs between runs without being what they compare.
_NOT_COMPARED = ("name", "seed", "model.seed", "trackers", "train.resume")


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder, read.

    name: relative to the folder that was searched. config: flat, by dotted keys. command: that starts it, if known.
    choices: the group choices of its configuration. rows: of metrics.jsonl. layers: of layers.jsonl.
    """

    name: str
    config: dict[str, Any]
    command: str
    choices: dict[str, str]
    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, root: Path) -> Run:
        """Reads a folder that has a metrics.jsonl; what else is missing is left empty."""
        import yaml

        config, about = folder / "config.yaml", folder / RUN
        told = json.loads(about.read_text()) if about.is_file() else {}
        name = str(folder.relative_to(root)) if folder != root else folder.name
        return cls(
            name=name,
            config=dict(_flat(yaml.safe_load(config.read_text()) or {})) if config.is_file() else {},
            command=told.get("command", ""),
            choices=told.get("choices", {}),
            rows=read_metrics(folder),
            layers=read_lines(folder / LAYERS),
        )

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """A row for each step, with the `seconds` that were spent on steps until then."""
        rows, seconds, tokens = [], 0.0, 0
        for row in self.rows:
            if "loss" in row:
                seconds += (row["tokens"] - tokens) / row["tokens_per_second"] if row["tokens_per_second"] else 0.0
                tokens = row["tokens"]
                rows.append({**row, "seconds": seconds})
        return rows

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """A row for each evaluation, with the tokens and seconds of the step before it."""
        done = {row["step"]: row for row in self.train}
        start = {"tokens": 0, "seconds": 0.0}
        return [
            {**row, **{key: done.get(row["step"], start)[key] for key in start}}
            for row in self.rows
            if "validation_loss" in row
        ]

    @property
    def diverged(self) -> bool:
        """Whether the last thing that it wrote is not finite: it ends where gradients are not."""
        last = (self.rows[-1].get(key, 0.0) for key in ("loss", "grad_norm", "validation_loss"))
        return not all(map(math.isfinite, last))

    @property
    def final(self) -> float:
        """The last validation loss; inf for a run that diverged, nan for one without."""
        return self._evaluated("validation_loss")

    @property
    def bits_per_byte(self) -> float:
        """The same in bits a byte of text."""
        return self._evaluated("bits_per_byte")

    @property
    def steps(self) -> int:
        """How many it has made."""
        return int(self.train[-1]["step"])

    @property
    def tokens_per_second(self) -> float:
        """Over all processes and steps; nan where no time was measured."""
        last = self.train[-1]
        return last["tokens"] / last["seconds"] if last["seconds"] else math.nan

    @property
    def skipped(self) -> int:
        """Its steps whose gradient was not finite."""
        return int(self.train[-1].get("skipped", 0))

    @property
    def lr(self) -> float:
        """The largest learning rate that the first param group had."""
        return max((row["lr"] for row in self.train), default=math.nan)

    @property
    def optimizer(self) -> str:
        """How it is called in a picture: the choice of the configuration, and SAM's."""
        target = str(self.config.get("optimizer._target_", "")).rpartition(".")[2]
        sam = self.choices.get("sam", "off" if not self.config.get("sam._target_") else "sam")
        return self.choices.get("optimizer", target or "?") + ("" if sam == "off" else f", sam={sam}")

    def _evaluated(self, key: str) -> float:
        if self.diverged:
            return math.inf
        return float(self.validation[-1].get(key, math.nan)) if self.validation else math.nan


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by the seed alone: what is said of them is a median.

    label: what sets them apart from the other groups.
    """

    label: str
    differs: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The last validation loss."""
        return median(run.final for run in self.runs)

    @property
    def bits_per_byte(self) -> float:
        """The same in bits a byte of text."""
        return median(run.bits_per_byte for run in self.runs)

    @property
    def steps(self) -> float:
        """How many were made."""
        return median(run.steps for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """Over all processes and steps."""
        return median(run.tokens_per_second for run in self.runs)

    @property
    def skipped(self) -> float:
        """Steps whose gradient was not finite."""
        return median(run.skipped for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest of the last validation losses; nan where there is none."""
        finals = [run.final for run in self.runs if not math.isnan(run.final)]
        return min(finals, default=math.nan), max(finals, default=math.nan)


def median(values: Iterable[float]) -> float:
    """The median of those that are not nan, which have not been measured; nan where none has."""
    return statistics.median([value for value in values if not math.isnan(value)] or [math.nan])


def find_runs(folder: Path) -> list[Run]:
    """Every run at or below a folder, by name; ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run, a sweep, or a folder of them")
    found = sorted(path.parent for path in folder.rglob(METRICS))
    runs = [run for run in (Run.read(path, folder) for path in found) if run.train]
    if not runs:
        raise ValueError(f"{folder} holds no run that has trained a step ({METRICS}): give a folder of runs")
    return sorted(
        runs, key=lambda run: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", run.name)]
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that are alike but for the seed, together; the best median first, those without one last."""
    keys = differing([run.config for run in runs])
    names = {run.optimizer for run in runs}
    # A difference between optimizers is told by their names.
    vary = {name: differing([run.config for run in runs if run.optimizer == name]) for name in names}
    groups: dict[str, Group] = {}
    for run in runs:
        differs = {key: run.config.get(key) for key in keys}
        told = (key for key in keys if key in ("optimizer.lr", "lr_scale") or key in vary[run.optimizer])
        label = ", ".join([run.optimizer, *(f"{_short(key)}={_value(differs[key])}" for key in told)])
        if not run.config:
            label = run.name
        groups.setdefault(json.dumps([label, differs], default=str), Group(label, differs)).runs.append(run)
    return sorted(groups.values(), key=lambda group: (math.isnan(group.final), group.final))


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all configurations."""
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
