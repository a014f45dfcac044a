"""The equivalence matrix: every optimizer on every engine is right, or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import matrix_table
from tests.harness.matrix import FEW, NAMES, REFUSED, SOME, TOLERANCE, Job, jobs, quick_jobs, unsharded
from tests.harness.optimizers import distance

JOBS = list(jobs())
ONE: dict[str, Any] = dict(dtype="fp32", casts=False, ranks=1, accumulation=1, deepspeed=False, steps=FEW)


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Iterator[dict[Job, dict[str, float | str]]]:
    """The cells; with `--table` they are written there, if all were computed and none is wrong."""
    found: dict[Job, dict[str, float | str]] = {}
    yield found
    path = request.config.getoption("--table")
    if path is not None and len(found) == len(JOBS):
        matrix_table.write(Path(path), found)


@pytest.mark.matrix
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_update_is_the_unsharded_one(job: Job, answers: dict[Job, dict[str, float | str]]) -> None:
    answers[job] = right(job)


@pytest.mark.parametrize("job", list(quick_jobs()), ids=str)
def test_a_few_steps_are_the_unsharded_ones(job: Job) -> None:
    right(job)


def right(job: Job) -> dict[str, float | str]:
    """The differences of a job, none of which is wrong."""
    found = job.differences()
    wrong = {n: a for n, a in found.items() if not isinstance(a, str) and not a <= TOLERANCE[job.dtype]}
    if wrong and job.dtype == "bf16":
        again = replace(job, draw=1).differences()
        found |= {name: again[name] for name in wrong}
        wrong = {n: (wrong[n], again[n]) for n in wrong if not again[n] <= TOLERANCE[job.dtype]}
    assert not wrong
    refused = {n: a for n, a in found.items() if isinstance(a, str)}
    assert {(job.engine, name) for name in refused} <= REFUSED, refused
    return found


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(NAMES), marks=pytest.mark.matrix)], ids=["some", "every"])
def test_what_the_runs_have_matters(names: tuple[str, ...]) -> None:
    """Lest the test above compare runs that would be alike anyway: each property shows in the unsharded one."""
    runs = [unsharded(name, **ONE) for name in names]
    for i, run in enumerate(runs):
        assert all(distance(run, other) > 4 * TOLERANCE["fp32"] for other in runs[:i]), names[i]
    for name, run in zip(names, runs):
        assert distance(run, unsharded(name, **ONE, max_norm=1e9)) > 100 * TOLERANCE["fp32"]
        assert distance(run, unsharded(name, **ONE | {"deepspeed": True})) > 100 * TOLERANCE["fp32"]
        rounded = unsharded(name, **ONE | {"dtype": "bf16", "casts": True})
        assert name == "lion" or distance(run, rounded) > 2 * TOLERANCE["bf16"]  # whose sign hides rounding
    # Under autocast little is rounded, and not every rule lets it through.
    assert distance(unsharded("sgd", **ONE), unsharded("sgd", **ONE | {"dtype": "bf16"})) > TOLERANCE["bf16"]
