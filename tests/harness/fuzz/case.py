"""A case: a command line with its files, and what has to come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

RUNS, REFUSED, EITHER = "runs", "refused", "either"
STOPPED = 75  # the exit code of a job that was asked to stop


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        words: What is added to the command of a tiny run.
        named: The line of a refusal has to hold one of these.
        verdict: Whether it has to run, to be refused, or either.
        files: The files that it reads, by name; of a folder with a `/` in it.
        copied: A folder of the fuzzer that `files` change; their content is None for a file that is to go.
    """

    words: tuple[str, ...]
    named: tuple[str, ...]
    verdict: str = EITHER
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    copied: str | None = None


class Outcome(NamedTuple):
    """What a command left: its exit code, None if it was stopped as too long, and what it wrote to stderr."""

    code: int | None
    err: str


def fault(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with the outcome of a case; None if nothing is."""
    code, err = outcome
    lines = [line for line in err.splitlines() if line.startswith("distopt: error: ")]
    if "Traceback (most recent call last)" in err:
        return f"a traceback that ends in {err.rstrip().splitlines()[-1]}"
    if code in (0, STOPPED, None):
        return "accepted" if case.verdict == REFUSED else None
    if code != 1 or len(lines) != 1:
        return f"exit code {code} with {len(lines)} lines of distopt: {err[-300:]}"
    if case.verdict == RUNS:
        return f"refused, and nothing is wrong with it: {lines[0]}"
    if not any(name in lines[0] for name in case.named):
        return f"a line that names none of {', '.join(case.named)}: {lines[0]}"
    return None
