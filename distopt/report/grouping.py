"""Which runs can be compared, what differs between them, and groups that differ by the seed only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distopt.report.runs import Run

# Differences of these keys make no other configuration: they change neither the training nor its measurement.
_NOT_COMPARED = (
    *("name", "seed", "model.seed", "trackers", "train.resume", "train.timeout_minutes", "checkpoint."),
    *("evaluation.prompt", "evaluation.sample_tokens", "data.cache_dir"),
    *("evaluation.generate", "evaluation.temperature"),
)
_RATES = ("optimizer.lr", "lr_scale")
_IN_THE_NAME = ("optimizer", "optimizer._target_", "sam", "sam._target_")
_MOST_KEYS = 3  # in a label


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by the seed only; its properties are means over the runs.

    Attributes:
        label: The optimizer, and at most three differences to the other groups.
        runs: The runs.
    """

    label: str
    runs: list[Run] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The last validation loss, in nats per token; inf if a run diverged."""
        return mean(run.final for run in self.runs)

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss, in bits per byte of text."""
        return mean(run.bits_per_byte for run in self.runs)

    @property
    def optimizer(self) -> str:
        """The name of the optimizer."""
        return self.runs[0].optimizer

    @property
    def diverged(self) -> int:
        """The number of runs that diverged."""
        return sum(run.diverged for run in self.runs)


@dataclass(frozen=True, eq=False)
class DataSet:
    """The runs on the same data with the same tokenizer, the only ones whose losses can be compared.

    Attributes:
        title: The data and the tokenizer, for a heading.
        groups: The groups, the least bits per byte first, those without a loss last.
    """

    title: str
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        """All runs, the best group first."""
        return [run for group in self.groups for run in group.runs]


def mean(values: Iterable[float]) -> float:
    """Return the mean of the measured values; nan, the value of an unmeasured one, if there are none."""
    measured = [value for value in values if not math.isnan(value)]
    with np.errstate(over="ignore"):
        return float(np.mean(measured)) if measured else math.nan


def deviation(values: Iterable[float]) -> float:
    """Return the sample standard deviation of the measured values; nan for fewer than two, or one that is infinite."""
    measured = [value for value in values if not math.isnan(value)]
    with np.errstate(over="ignore"):
        return float(np.std(measured, ddof=1)) if len(measured) > 1 and all(map(math.isfinite, measured)) else math.nan


def by_data(runs: Sequence[Run]) -> list[DataSet]:
    """Return the runs by data and tokenizer, those with the most runs first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_data(run), []).append(run)
    sets = sorted(found.values(), key=len, reverse=True)
    return [DataSet(_title(of_set[0]), grouped(of_set)) for of_set in sets]


def _data(run: Run) -> str:
    """What the data of equal runs have in common: the digest of the tokens, or its keys in older runs."""
    if "digest" in run.about:
        return run.about["digest"]
    keys = sorted(key for key in run.config if key.startswith("data.") and not key.startswith(_NOT_COMPARED))
    return json.dumps([[key, run.config[key]] for key in keys], default=str)


def _title(run: Run) -> str:
    data = run.about.get("data") or run.config.get("data.path") or run.choices.get("data") or "data that is not known"
    tokenizer = run.about.get("tokenizer") or run.config.get("data.tokenizer") or "bytes"
    return f"{data}, {'bytes as tokens' if tokenizer == 'bytes' else f'tokenizer {Path(str(tokenizer)).name}'}"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ by the seed only; the least bits per byte first, groups without a loss last."""
    keys = [key for key in differing(runs) if key not in _IN_THE_NAME]
    found: dict[str, list[Run]] = {}
    for run in runs:
        identity = [run.optimizer, *(value_of(run, key) for key in keys), *([] if run.config else [run.name])]
        found.setdefault(json.dumps(identity, default=str), []).append(run)
    labels = [label(of_group[0], runs, keys) for of_group in found.values()]
    groups = [
        Group(text if labels.count(text) == 1 and of_group[0].config else f"{text} ({of_group[0].name})", of_group)
        for text, of_group in zip(labels, found.values())
    ]
    in_bits = not any(math.isnan(group.bits_per_byte) and not math.isnan(group.final) for group in groups)

    def rank(group: Group) -> tuple[bool, float]:
        loss = group.bits_per_byte if in_bits else group.final
        return math.isnan(loss), loss

    return sorted(groups, key=rank)


def label(run: Run, runs: Sequence[Run], keys: Sequence[str]) -> str:
    """Return the optimizer of a run, and at most three differences to others: the rate, then what takes most values.

    Args:
        run: The run.
        runs: The runs on the page that it is compared with.
        keys: The keys that differ between these.
    """
    alike = [other for other in runs if other.optimizer == run.optimizer]
    vary = {key: len({json.dumps(value_of(other, key), default=str) for other in alike}) for key in keys}
    rates = [key for key in keys if key in _RATES]
    others = sorted((key for key in keys if vary[key] > 1 and key not in rates), key=lambda key: -vary[key])
    shown = [*rates, *others][:_MOST_KEYS]
    return ", ".join([run.optimizer, *(f"{short(key, keys)}={_value(value_of(run, key))}" for key in shown)])


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the groups whose choices, and the keys whose values differ between runs.

    A key differs only if it does so between runs that have the same choice of its group, and all have the key: what a
    choice implies is no difference of its own, but for the learning rate. Their order is that of the configuration.
    """
    groups = [name for name in dict.fromkeys(name for run in runs for name in run.choices) if name != "experiment"]
    chosen = [name for name in groups if _several(run.choices.get(name) for run in runs)]
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return chosen + [
        key for key in keys if key not in chosen and not key.startswith(_NOT_COMPARED) and _varies(runs, key)
    ]


def _varies(runs: Sequence[Run], key: str) -> bool:
    parts: dict[Any, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run.config:
            choice = None if key in _RATES else run.choices.get(key.partition(".")[0])
            parts.setdefault(choice, []).append(run.config)
    return any(all(key in config for config in of) and _several(config[key] for config in of) for of in parts.values())


def _several(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, default=str) for value in values}) > 1


def value_of(run: Run, key: str) -> Any:
    """Return the value of a key of a run's configuration, or the choice of a group; None without one."""
    return run.config.get(key, run.choices.get(key))


def short(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a key, or all of it if another one ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _value(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else "null" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"
