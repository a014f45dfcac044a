"""A run's folder belongs to one job: a second one is refused, whatever its `train.resume`, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from distopt.job import run_lock
from distopt.job.run_lock import RunLock
from tests.harness import jobs
from tests.harness.jobs import overrides
from tests.harness.runs import copied, last_step, until


def test_a_folder_belongs_to_one_job_until_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_DYING", 0.1)
    first = RunLock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"belongs to a job that is running, process {os.getpid()} on .*, since 20"):
        RunLock(tmp_path / "run")
    first.opened()
    first.release()
    second = RunLock(tmp_path / "run")
    assert (second.note, second.restarted) == ("", False)


def test_the_place_of_a_job_that_was_killed_is_taken_with_a_line(tmp_path: Path) -> None:
    process = jobs.fork(_die, tmp_path)
    process.join(60)
    owner = RunLock(tmp_path)
    assert f"taken over from a job that ended unfinished, process {process.pid} on" in owner.note
    assert not owner.restarted  # of another launcher


def test_a_job_that_is_dying_is_waited_for(tmp_path: Path) -> None:
    process = jobs.fork(_die, tmp_path, 1.0)
    until((tmp_path / ".owner.json").exists, process.is_alive)
    assert "taken over from a job that ended unfinished" in RunLock(tmp_path).note
    process.join(60)


def _die(folder: Path, seconds: float = 0.0) -> None:
    RunLock(folder).opened()
    time.sleep(seconds)
    os._exit(9)


def test_an_owner_file_that_is_torn_is_no_owner(tmp_path: Path) -> None:
    for torn in ("", "{", "[1]", '{"opened": true}'):
        (tmp_path / ".owner.json").write_text(torn)
        lock = RunLock(tmp_path)
        assert not lock.restarted
        lock.release()


@pytest.mark.parametrize("resume", ["never", pytest.param("auto", marks=pytest.mark.matrix)])
def test_a_second_job_of_a_name_is_refused_and_the_first_goes_on(cwd: Path, resume: str) -> None:
    run = cwd / "runs" / "two"
    first = jobs.start(cwd, overrides(name="two", train__steps="100000"))
    try:
        until(lambda: last_step(run) > 2, first.processes[0].is_alive)
        (second,) = jobs.run(cwd, overrides(name="two", train__resume=resume))
        assert (second.code, second.err.count("\n")) == (1, 1)
        assert f"{run} belongs to a job that is running, process {first.processes[0].pid} on" in second.err
        step = last_step(run)
        until(lambda: last_step(run) > step, first.processes[0].is_alive)
        owner = json.loads((run / ".owner.json").read_text())
        assert owner["process"] == first.processes[0].pid
    finally:
        first.kill()
    assert [path.name for path in (cwd / "runs").iterdir()] == ["two"]  # nothing was moved aside


def test_checkpoints_that_were_moved_to_another_disk_are_resumed_where_they_are(finished: Path, cwd: Path) -> None:
    run = copied(finished, cwd)
    shutil.move(run / "checkpoints", cwd / "disk")
    (run / "checkpoints").symlink_to(cwd / "disk")
    jobs.train(
        cwd, name="done", schedule="constant", schedule__warmup_steps="0", train__steps="10", train__resume="auto"
    )
    assert [path.name for path in (cwd / "runs").iterdir()] == ["done"]
    assert last_step(run) == 10
    assert (cwd / "disk" / "step_00000010").is_dir()
