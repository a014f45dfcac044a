"""`hydra/launcher=accelerate`: real sweeps of a script without distopt, and of `distopt.train`."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import jobs
from tests.harness.jobs import ENVIRONMENT, metrics, overrides
from tests.harness.launcher import SWEEP, notes, sweep
from tests.harness.runs import until


def test_a_sweep_of_any_script(tmp_path: Path, script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs at the same time, one of which fails; the same command runs only that one again."""
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "4,7")
    two = ["hydra.launcher.jobs=2", "hydra.launcher.num_processes=2", "+hydra.launcher.env.MINE=yes", "x=1,2"]
    ended = sweep(tmp_path, script, *two, "word='a=b, ${x}'")
    assert ended.code == 1
    said = ended.err.splitlines()
    assert [line for line in said if "started" in line] == [
        "#0 x=1: started, out/0/launch.log",
        "#1 x=2: started, out/1/launch.log",
    ]
    assert re.search(r"^#0 x=1: 1, \d+\.\d s$", ended.err, re.M)
    failed = f"ValueError: two is not allowed (log: {tmp_path}/out/1/launch.log)"
    assert re.search(rf"^#1 x=2: failed: {re.escape(failed)}, \d+\.\d s$", ended.err, re.M)
    assert "1 of 2 jobs failed: #1" in ended.err and "Traceback" not in ended.err
    assert failed in said  # Hydra's own last word
    assert said.index("#1 x=2: started, out/1/launch.log") < min(i for i, line in enumerate(said) if "1, " in line)

    seen = [notes(tmp_path / "out" / job) for job in ("0", "1")]
    assert {rank["word"] for rank in seen[0]} == {"a=b, 1"}
    assert len(seen[0]) == 2 and len(seen[1]) in (1, 2)  # a rank that fails ends the other, which may not have begun
    assert [{rank["WORLD_SIZE"] for rank in ranks} for ranks in seen] == [{"2"}, {"2"}]
    assert [{rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} for ranks in seen] == [{"4"}, {"7"}]
    assert len({rank["MASTER_PORT"] for ranks in seen for rank in ranks}) == 2
    assert {(rank["MINE"], rank["HYDRA_LAUNCHER_RESUME"]) for ranks in seen for rank in ranks} == {("yes", "never")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".launch.lock", "0", "1", "multirun.yaml"]
    assert (tmp_path / "out" / "0" / ".hydra" / "config.yaml").is_file()

    again = sweep(tmp_path, script, *two, "word='a=b, ${x}'")
    assert again.code == 0, again.err
    assert "#0 x=1: 1, done before" in again.err.splitlines() and "#0 x=1: started" not in again.err
    assert re.search(r"^#1 x=2: 4, \d+\.\d s$", again.err, re.M)
    assert {rank["HYDRA_LAUNCHER_RESUME"] for rank in notes(tmp_path / "out" / "1")} == {"auto"}


@pytest.mark.matrix
def test_a_failing_job_ends_no_sweep(tmp_path: Path, script: list[str]) -> None:
    """One after the other, the second of three fails: the third runs."""
    ended = sweep(tmp_path, script, "x=1,2,3")
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if line.startswith("#")]
    told = ["#0 x=1: started", "#0 x=1: 1,", "#1 x=2: started", "#1 x=2: failed:", "#2 x=3: started", "#2 x=3: 9,"]
    assert [line.startswith(start) for line, start in zip(lines, told, strict=True)] == [True] * 6, ended.err
    assert "1 of 3 jobs failed: #1" in ended.err
    assert [note["word"] for job in "02" for note in notes(tmp_path / "out" / job)] == ["from the file"] * 2


ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.matrix) for n in (signal.SIGTERM, signal.SIGKILL))]
)
def test_ending_a_sweep_ends_all_its_processes(tmp_path: Path, script: list[str], number: signal.Signals) -> None:
    """Also those that ignore SIGTERM, and those that torchrun has put into process groups of their own."""
    words = [*SWEEP, "hydra.launcher.num_processes=2", "hydra.launcher.grace_seconds=1", "do=sleep", "x=1,2"]
    with jobs.launched(tmp_path, words, script) as (process, _, err):
        until(lambda: len(notes_or_none(tmp_path / "out" / "0")) == 2, lambda: process.poll() is None)
        started = descendants(process.pid)
        assert {note["pid"] for note in notes(tmp_path / "out" / "0")} <= set(started) and len(started) >= 3
        process.send_signal(number)
        assert process.wait(20) == ENDS[number]
        until(lambda: not any(runs(pid) for pid in started), lambda: True, 10)
        if number != signal.SIGKILL:
            assert f"{number.name}: 0 of 2 jobs are done" in err.read_text() and "Traceback" not in err.read_text()
    assert not (tmp_path / "out" / "1").exists()


def notes_or_none(job: Path) -> list[dict[str, Any]]:
    try:
        return notes(job)
    except json.JSONDecodeError:  # half written
        return []


def descendants(pid: int) -> list[int]:
    own = jobs.children(pid)
    return [*own, *(below for child in own for below in descendants(child))]


def runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.matrix
def test_a_sweep_of_distopt(tmp_path: Path) -> None:
    """The jobs train in their own folders, which also have the launcher's log, and return their loss."""
    jobs.write_text(tmp_path)
    words = overrides(name="grid", train__steps="4", optimizer="adamw,lamb", model__config__n_embd="16")
    ended = sweep(tmp_path, [sys.executable, "-m", "distopt.train"], *words, "hydra.launcher.jobs=2")
    assert ended.code == 0, ended.err
    grid = tmp_path / "runs" / "grid"
    assert sorted(path.name for path in grid.iterdir() if path.is_dir()) == ["0", "1"]
    for number, name in enumerate(("adamw", "lamb")):
        run = grid / str(number)
        assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["_target_"].lower().endswith(name)
        loss = [row["validation_loss"] for row in metrics(run) if "validation_loss" in row][-1]
        assert re.search(rf"^#{number} optimizer={name}: {loss:.6g}, ", ended.err, re.M), ended.err
        assert "resume: " in (run / "launch.log").read_text()
