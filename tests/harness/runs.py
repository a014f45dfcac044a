"""What a test reads of the runs that `tests.harness.jobs` started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distopt.job.records import read_metrics
from tests.harness import jobs
from tests.harness.jobs import metrics, overrides

CONF = Path(__file__).parents[2] / "conf"
OPTIMIZERS = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))
# What a resumed run has to give back: masks of dropout.
DROPOUT = {f"model__config__{name}_pdrop": "0.1" for name in ("resid", "embd", "attn")}
TIMES = ("tokens_per_second", "data_seconds")  # the numbers that two equal runs do not share


def rows(run: Path, after: int = -1, losses_only: bool = False) -> list[dict[str, Any]]:
    """A run's metrics after a step, without the times."""
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(run) if row["step"] > after]
    return [row for row in kept if "loss" in row] if losses_only else kept


def steps(run: Path) -> list[int]:
    return [row["step"] for row in metrics(run) if "loss" in row]


def last_step(run: Path) -> int:
    """The last step of a run that may be running still; 0 before the first."""
    return max((row["step"] for row in read_metrics(run)), default=0)


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run) if "loss" in row]


def until(happened: Callable[[], bool], alive: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds * jobs.PATIENCE
    while not happened():
        assert alive(), "the run ended by itself"
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.01)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def copied(finished: Path, cwd: Path) -> Path:
    """The finished run, for a test to spoil."""
    for file in (finished / "runs").rglob("*"):
        if file.is_file():
            target = cwd / "runs" / file.relative_to(finished / "runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return cwd / "runs" / "done"


LONGER = {"name": "done", "schedule": "constant", "schedule__warmup_steps": "0", "train__steps": "10"}


def not_one_line(folder: Path, table: dict[str, tuple[str, ...]], **changes: str) -> dict[str, jobs.Ended]:
    """Of a table's commands those that do not end with code 1 and one line, with all that it has to hold."""
    commands = [[*overrides(**changes), *words.split()] for words in table]
    answers = zip(table.items(), jobs.one_after_another(folder, commands), strict=True)
    return {words: ended for (words, expected), ended in answers if not _one_line(ended, expected)}


def _one_line(ended: jobs.Ended, expected: tuple[str, ...]) -> bool:
    lines = ended.err.strip().splitlines()
    said = len(lines) == 1 and lines[0].startswith("distopt: error: ") and all(part in lines[0] for part in expected)
    return said and (ended.code, ended.out) == (1, "")
