"""A run, or a sweep, that is refused leaves no folder behind, and takes none away that was there."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distopt.job.leftovers import Before, no_leftovers
from distopt.job.run_lock import RunLock
from tests.harness import jobs
from tests.harness.jobs import overrides

# By the words: the first check, and the last, after the run's folder is locked; a sweep of one process, and of ours.
REFUSED = {
    "optimizer.lr=-1": "optimizer.lr must be a number >= 0, got -1",
    "train.sequence_length=100": "train.sequence_length=100 is longer than the model's 64 positions",
    "-m train.steps=0,1": "train.steps must be an integer >= 1 or null, got 0",
    "-m hydra/launcher=accelerate optimizer.lr=1,-2": "job #1, optimizer.lr=-2: optimizer.lr must be a number >= 0",
    "-m hydra/launcher=accelerate hydra.launcher.num_processes=2 train.batch_size=8,9": "job #1, train.batch_size=9: "
    "train.batch_size=9 is not a multiple of the 2 processes",
    "-m hydra/launcher=accelerate train.steps=20,2": "job #1, train.steps=2: warmup longer than the run: "
    "schedule.warmup_steps must be less than train.steps = 2, got 2; shorten the warmup or train for longer",
    "-m hydra/launcher=accelerate optimizer.lrr=1,2": "there is no optimizer.lrr: did you mean lr?",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused_leaves_nothing(words: str, message: str, tmp_path: Path) -> None:
    """Hydra makes the folder first: an empty runs/train stayed; a sweep started each of its jobs, and left logs."""
    jobs.write_text(tmp_path)
    given = words.split()
    keys = {word.partition("=")[0] for word in given}
    tiny = [word for word in overrides() if word.partition("=")[0] not in keys]
    ended = jobs.python("-m", "distopt.train", *tiny, *given, cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    *others, line = ended.err.splitlines()
    assert line.startswith(f"distopt: error: {message}") and "error" not in "".join(others)
    assert not (tmp_path / "runs").exists()


def refused(folder: Path, *written: str) -> None:
    """A run in a folder that is refused after it has written some files."""
    Before().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": str(folder)}}}))
    with pytest.raises(ValueError, match="refused"), no_leftovers():
        folder.mkdir(parents=True, exist_ok=True)
        for name in written:
            (folder / name).write_text("")
        raise ValueError("refused")


def test_what_was_there_stays(tmp_path: Path) -> None:
    for folder in ("runs", "empty", "there/runs/old"):
        (tmp_path / folder).mkdir(parents=True)
    refused(tmp_path / "runs" / "new" / "0", "multirun.yaml")
    refused(tmp_path / "empty")
    refused(tmp_path / "there" / "runs" / "new")
    refused(tmp_path / "begun", "config.yaml")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"runs", "empty", "there", "there/runs", "there/runs/old", "begun", "begun/config.yaml"}


def test_the_lock_of_another_job_stays(tmp_path: Path) -> None:
    """Two jobs that start at once find no folder: the one that is refused leaves the other its lock."""
    folder = tmp_path / "runs" / "book"
    Before().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": str(folder)}}}))
    lock = RunLock(folder)
    owner = folder / ".owner.json"
    owner.write_text(owner.read_text().replace('"process": ', '"process": 1'))
    with pytest.raises(ValueError, match="belongs to a job that is running"), no_leftovers():
        RunLock(folder)
    assert owner.is_file() and (folder / ".lock").is_file()
    lock.release()
