"""Runs cases, all of them in one process: a command that is not refused goes on in a process forked from it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import jobs, pretrained
from tests.harness.fuzz import command_lines, data_files
from tests.harness.fuzz.case import Case, Outcome, fault
from tests.harness.fuzz.seeds import seeds

_SECONDS = 40.0  # of a run, after which it is stopped: it was accepted
_TOO_LONG = "too long"
_MEMORY = 16 << 30  # bytes of address space
SMALL = {
    "train__steps": "2",
    "schedule__warmup_steps": "1",
    "evaluation__every": "2",
    "checkpoint__every": "2",
    "evaluation__sample_tokens": "2",
    "model__config__n_layer": "1",
}


# Keys of the tiny run that a choice does not have.
ABSENT = {"data=mixture": ("data.path",), "data=stream": ("data.validation_fraction",)}


def fuzz(folder: Path, count: int, seed: int, every: int = 1) -> tuple[dict[str, int], list[str]]:
    """Tries the seeds and random cases.

    Args:
        folder: An empty folder to work in.
        count: The number of random cases.
        seed: The seed of these.
        every: One of so many seeds is tried as well.

    Returns:
        How many commands ended how, and a line for each fault.
    """
    report = folder / "report.json"
    process = jobs.fork(_fuzz, folder, count, seed, every, report)
    process.join()
    assert process.exitcode == 0, f"the fuzzer ended with {process.exitcode}"
    counts, faults = json.loads(report.read_text())
    return counts, faults


def _fuzz(folder: Path, count: int, seed: int, every: int, report: Path) -> None:
    model = pretrained.write_model(folder / "model")
    jobs.write_text(folder, words=3000)
    rng = random.Random(seed)
    cases = seeds(model)[::every]
    for _ in range(count):
        cases.append(command_lines.draw(rng) if rng.random() < 0.75 else data_files.draw(rng, model))
    counts: dict[str, int] = {}
    faults = []
    for number, case in enumerate(cases):
        outcome = outcome_of(folder, case)
        how = {0: "ran", 1: "refused", 75: "stopped", None: "too long"}.get(outcome.code, "died")
        counts[how] = counts.get(how, 0) + 1
        if wrong := fault(case, outcome):
            faults.append(f"{number}: {' '.join(case.words)}: {wrong}")
            print(faults[-1], flush=True)
    report.write_text(json.dumps([counts, faults]))


def outcome_of(folder: Path, case: Case) -> Outcome:
    """Runs a case in a folder of its own, below one with `text.txt` and `model`."""
    cwd = folder / "case"
    cwd.mkdir()
    shutil.copy(folder / "text.txt", cwd)
    if case.copied:
        shutil.copytree(folder / case.copied, cwd / case.copied)
    for name, content in case.files.items():
        if content is None:
            (cwd / name).unlink(missing_ok=True)
        else:
            (cwd / name).write_bytes(content)
    given = " ".join(case.words)
    changed = [group for group in ("model", "data") if f"{group}=" in given or f"{group}.path=" in given]
    own = {word.partition("=")[0].lstrip("+~") for word in case.words}
    absent = {key for choice, keys in ABSENT.items() if choice in given for key in keys}
    base = [
        word
        for word in jobs.overrides(**SMALL)
        if word.partition("=")[0] not in own
        and not ("model" in changed and word.startswith("model."))
        and not ("data.path" in given and word.startswith("data="))
        and not ("data=" in given and word.startswith("data="))
        and word.partition("=")[0] not in absent
    ]
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.ExitStack() as stack:
            err, out = stack.enter_context(open("err", "w+")), stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(contextlib.redirect_stdout(out))
            code = _ended(lambda: _command([*base, *case.words], err.fileno()))
        return Outcome(code, Path("err").read_text(errors="replace"))
    finally:
        os.chdir(before)
        shutil.rmtree(cwd)


def _command(words: list[str], stderr: int) -> None:
    """What `python -m distopt.train` does, up to the point at which a process group would be needed."""
    from distopt.job import cli
    from distopt.job.build import build
    from distopt.job.check import check
    from distopt.job.components import Components
    from distopt.job.errors import one_line_errors
    from distopt.job.terminal import Terminal

    @cli.program("train")
    def job(cfg: Any) -> None:
        with one_line_errors():
            check(cfg, "train")
            Components.of(cfg)

        def run() -> None:
            with one_line_errors(), Terminal() as terminal:
                _stop_at_step_3()
                build(cfg, terminal).run()

        sys.exit(_forked(run, stderr))

    with one_line_errors(), cli.explained():
        sys.argv = ["distopt.train", *cli.model_words(words)]
        job()


def _ended(command: Callable[[], None]) -> int | None:
    """Returns the exit code of a command; 1, and a traceback on stderr, if it raises anything else."""
    try:
        command()
    except SystemExit as end:
        return None if end.code == _TOO_LONG else end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forked(run: Callable[[], None], stderr: int) -> int | str:
    """Returns the exit code of a function in a process of its own, negative for a signal."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.dup2(stderr, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        code = _ended(run)
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    deadline = time.monotonic() + _SECONDS * jobs.PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _TOO_LONG


def _stop_at_step_3() -> None:
    """Has a run that was told to take more steps stop by a signal."""
    from distopt.job.job import Job

    step = Job.train_step

    def stopped(job: Job, *args: Any) -> Any:
        done = step(job, *args)
        if job.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    Job.train_step = stopped  # type: ignore[method-assign]
