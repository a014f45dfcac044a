"""A run as its folder tells it: configuration, metrics, and what trained on what."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distopt.job.records import ALARMS, LAYERS, METRICS, RUN, SAMPLES, read_lines, read_metrics
from distopt.report.checked import (
    checked_about,
    checked_alarms,
    checked_layers,
    checked_rows,
    checked_samples,
    read_mapping,
)

CONFIG = "config.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run's folder.

    Attributes:
        folder: The folder.
        name: Its name on the page: relative to the folder that was searched.
        config: The configuration, by dotted keys.
        about: The contents of run.json: command, choices of groups, model, data, device, version and so on.
        rows: The rows of metrics.jsonl.
        layers: The rows of layers.jsonl.
        alarms: The rows of alarms.jsonl.
        samples: The rows of samples.jsonl that the last evaluation has written.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    alarms: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """Read a folder that has a metrics.jsonl; other missing files are left empty.

        Raises:
            ValueError: For a file that a run has not written, with its name and what is wrong in it.
        """
        import yaml

        return cls(
            folder=folder,
            name=name,
            config=dict(_flat(read_mapping(folder / CONFIG, yaml.safe_load))),
            about=checked_about(read_mapping(folder / RUN, json.loads), folder / RUN),
            rows=checked_rows(read_metrics(folder), folder / METRICS),
            layers=checked_layers(read_lines(folder / LAYERS), folder / LAYERS),
            samples=checked_samples(read_lines(folder / SAMPLES), folder / SAMPLES),
            alarms=checked_alarms(read_lines(folder / ALARMS), folder / ALARMS),
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
    def choices(self) -> dict[str, str]:
        """The choices of the configuration's groups."""
        return self.about["choices"]

    @property
    def diverged(self) -> bool:
        """Whether the last row is not finite; a run ends when its gradients are not finite."""
        kinds = ("loss", "validation_loss")  # callbacks write rows of their own
        last: dict[str, Any] = next((row for row in reversed(self.rows) if any(kind in row for kind in kinds)), {})
        return not all(math.isfinite(last.get(key, 0.0)) for key in (*kinds, "grad_norm"))

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
        return isinstance(steps, int) and self.steps < steps and not self.diverged and not self.stopped_early

    @property
    def stopped_early(self) -> str:
        """Why a callback has ended the run before its last step; "" if none has."""
        return str(self.about.get("stopped_early", ""))

    @property
    def tokens_per_second(self) -> float:
        """The throughput of all processes over all steps; nan if no time was measured."""
        last = self.train[-1]
        return last["tokens"] / last["seconds"] if last["seconds"] else math.nan

    @property
    def tokens(self) -> float:
        """The number of tokens of all steps, without padding."""
        return float(self.train[-1]["tokens"])

    @property
    def target_tokens(self) -> float:
        """The number of those that were learnt to be predicted; nan for a run that has not counted them."""
        return float(self.train[-1].get("target_tokens", math.nan))

    @property
    def accuracy(self) -> float:
        """The share of the targets of the last evaluation that were the most likely token; nan if it is not known."""
        return float(self.validation[-1].get("validation_token_accuracy", math.nan)) if self.validation else math.nan

    @property
    def exact_match(self) -> float:
        """The share of the prompts whose last sample was the answer; nan for a run without answers."""
        known = [row["match"] for row in self.samples if isinstance(row.get("match"), bool)]
        return sum(known) / len(known) if known else math.nan

    @property
    def skipped(self) -> int:
        """The number of steps whose gradient was not finite."""
        return int(self.train[-1].get("skipped", 0))

    @property
    def lr(self) -> float:
        """The largest learning rate of the first param group, to six digits: the schedules round differently."""
        return float(f"{max((row['lr'] for row in self.train), default=math.nan):.6g}")

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


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], config
