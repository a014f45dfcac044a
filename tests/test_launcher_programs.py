"""Sweeps of every kind of program, on several machines, by other sweepers and launchers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from distopt.job.run_folder import open_folder
from tests.harness import jobs
from tests.harness.jobs import metrics, overrides
from tests.harness.launcher import CONFIG, SWEEP, notes, sweep, written
from tests.harness.runs import last_step, losses, until

# What takes longer

KINDS = ("file 1.1", "file 1.2", "module", "--config-dir", "elsewhere")


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_every_kind(tmp_path: Path, kind: str) -> None:
    """A file and a module; the configuration next to it, in a package or added by the command; another folder."""
    version = kind.split()[1] if kind.startswith("file") else "1.3"
    home = tmp_path / "package"
    home.mkdir()
    command, words, cwd = written(home, version), ["x=3,4"], tmp_path
    if kind == "module":
        for folder in (home, home / "conf"):
            (folder / "__init__.py").touch()
        command = [sys.executable, "-m", "package.script"]
    if kind == "--config-dir":
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "other.yaml").write_text(CONFIG.replace("from the file", "from the other"))
        words += ["--config-dir", "more", "--config-name", "other"]
    if kind == "elsewhere":
        cwd = tmp_path / "elsewhere"
        cwd.mkdir()
        command[1] = "../package/script.py"
    ended = sweep(cwd, command, *words)
    assert ended.code == 0, ended.err
    for number, value in enumerate((9, 16)):
        (note,) = notes(cwd / "out" / str(number))
        assert note["word"] == ("from the other" if kind == "--config-dir" else "from the file")
        assert note["job"] == number
        assert note["cwd"] == str(cwd / "out" / str(number) if version == "1.1" else cwd)  # 1.1 changes the folder
        assert re.search(rf"^#{number} x={number + 3}: {value}, ", ended.err, re.M), ended.err


@pytest.mark.matrix
def test_jobs_that_end_oddly_have_failed(tmp_path: Path, script: list[str]) -> None:
    """Ended before the function returned; over the time limit; another number of processes than requested."""
    fewer = tmp_path / "one.yaml"
    fewer.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_machines: 1\nnum_processes: 1\n")
    for words, message in {
        ("do=leave",): "it ended, with exit code 0, before its function had returned",
        ("do=sleep", "hydra.launcher.timeout_minutes=0.2"): "it took longer than hydra.launcher.timeout_minutes",
        (
            f"hydra.launcher.config_file={fewer}",
            "hydra.launcher.num_processes=2",
        ): "2 processes were requested, 1 started",
    }.items():
        ended = sweep(tmp_path, script, *words, "x=1", "hydra.launcher.grace_seconds=1", "hydra.launcher.resume=false")
        assert ended.code == 1 and message in ended.err, ended.err


@pytest.mark.matrix
def test_a_job_of_another_configuration_is_run_again(tmp_path: Path, script: list[str]) -> None:
    """A result belongs to the composed configuration, not to the job's number."""
    assert sweep(tmp_path, script, "x=1,3").code == 0
    assert "2 of 2 jobs were done before" in sweep(tmp_path, script, "x=1,3").err
    ended = sweep(tmp_path, script, "x=1,4")
    assert "#0 x=1: 1, done before" in ended.err and re.search("^#1 x=4: 16, ", ended.err, re.M)
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG.replace("from the file", "changed"))
    ended = sweep(tmp_path, script, "x=1,4")
    assert "done before" not in ended.err
    assert notes(tmp_path / "out" / "0")[0]["HYDRA_LAUNCHER_RESUME"] == "never"


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_an_interrupted_sweep_resumes_bit_for_bit(tmp_path: Path) -> None:
    """SIGTERM in its second job: the first is not run again, the second resumes, the third follows."""
    jobs.write_text(tmp_path)
    every = {"evaluation__every": "300", "checkpoint__every": "300", "engine": "fsdp2"}
    lengths = ("10", "300", "12")
    words = [*SWEEP, *overrides(name="grid", **every, train__steps=",".join(lengths)), "hydra.launcher.num_processes=2"]
    command, grid = [sys.executable, "-m", "distopt.train"], tmp_path / "runs" / "grid"
    with jobs.launched(tmp_path, words, command) as (process, _, err):
        until(lambda: (grid / "1").is_dir() and last_step(grid / "1") > 5, lambda: process.poll() is None, 240)
        process.terminate()
        assert process.wait(60) == 143
        assert "SIGTERM: 1 of 3 jobs are done" in err.read_text()
    stopped = last_step(grid / "1")
    assert stopped < 300
    ended = jobs.launch(tmp_path, words, command, 240)
    assert ended.code == 0, ended.err
    assert re.search("^#0 train.steps=10: .*, done before$", ended.err, re.M)
    assert f"resuming after step {stopped} from" in (grid / "1" / "launch.log").read_text()
    for job in (1, 2):
        jobs.train(tmp_path, 2, name=f"alone-{job}", train__steps=lengths[job], **every)
        assert losses(grid / str(job)) == losses(tmp_path / "runs" / f"alone-{job}")
    assert sorted(path.name for path in grid.iterdir() if path.is_dir()) == ["0", "1", "2"]


@pytest.mark.matrix
def test_optuna_minimises_the_loss_and_the_worst_are_stopped(tmp_path: Path) -> None:
    """Its trials are jobs, two at a time; those that a rung stops are pruned; started again, nothing runs."""
    jobs.write_text(tmp_path)
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweeper.n_trials=4",
        "hydra.launcher.jobs=2",
        "hydra.launcher.rungs=[20]",
        "optimizer.lr=tag(log,interval(1e-9,1e-1))",
    ]
    command, run = [sys.executable, "-m", "distopt.train"], tmp_path / "runs" / "search"
    words = [*overrides(name="search", train__steps="100", evaluation__every="10"), *search]
    ended = sweep(tmp_path, command, *words, seconds=200)
    assert ended.code == 0, ended.err
    best = yaml.safe_load((run / "optimization_results.yaml").read_text())
    trials = json.loads((run / "trials.json").read_text())["trials"]
    found = {}
    for number, trial in enumerate(trials):
        stopped = re.search(rf"^#{number} .*: stopped at step (\d+): ", ended.err, re.M)
        assert trial["state"] == ("pruned" if stopped else "complete")
        values = {row["step"]: row["validation_loss"] for row in metrics(run / str(number)) if "validation_loss" in row}
        assert trial["values"] == [values[int(stopped[1]) if stopped else 100]]
        lr = yaml.safe_load((run / str(number) / "config.yaml").read_text())["optimizer"]["lr"]
        assert trial["params"] == {"optimizer.lr": lr}
        if not stopped:
            found[values[100]] = lr
    assert len(trials) == 4 and 1 <= len(found) <= 3
    assert best == {"name": "optuna", "best_params": {"optimizer.lr": found[min(found)]}, "best_value": min(found)}

    again = sweep(tmp_path, command, *words, seconds=200)
    assert "search: 4 of 4 trials were done before" in again.err and "started" not in again.err
    assert yaml.safe_load((run / "optimization_results.yaml").read_text()) == best


@pytest.mark.matrix
def test_several_machines_by_a_prefix(tmp_path: Path, script: list[str]) -> None:
    """The prefix of `accelerate launch` starts it on every machine, here twice on this one."""
    twice = tmp_path / "twice"
    twice.write_text('#!/usr/bin/env bash\n"$@" & one=$!\n"$@" & two=$!\nwait $one && wait $two\n')
    twice.chmod(0o755)
    machines = [f"hydra.launcher.prefix=[{twice}]", "hydra.launcher.num_machines=2", "hydra.launcher.num_processes=4"]
    ended = sweep(tmp_path, script, *machines, "hydra.launcher.main_process_ip=localhost", "x=3,4")
    assert ended.code == 0, ended.err
    for number in (0, 1):
        assert [note["WORLD_SIZE"] for note in notes(tmp_path / "out" / str(number))] == ["4"] * 4


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_other_launchers_of_hydra(tmp_path: Path, launcher: str) -> None:
    """One process per job: they call the function and launch nothing."""
    jobs.write_text(tmp_path)
    words = [*overrides(name="grid", train__steps="4", optimizer="adamw,lamb"), f"hydra/launcher={launcher}"]
    ended = jobs.launch(tmp_path, ["-m", *words], [sys.executable, "-m", "distopt.train"], 200)
    assert ended.code == 0, ended.err
    for job in ("0", "1"):
        assert [row["step"] for row in metrics(tmp_path / "runs" / "grid" / job) if "loss" in row] == [1, 2, 3, 4]


def test_an_older_run_is_moved_aside_without_what_the_launcher_wrote(tmp_path: Path) -> None:
    """The open log and the identity of the job stay in the folder of the job."""
    folder = tmp_path / "0"
    (folder / ".launch").mkdir(parents=True)
    (folder / ".launch" / "job.json").touch()
    (folder / "launch.log").touch()
    assert open_folder(folder, None) is None
    assert not (tmp_path / "0-1").exists()
    (folder / "metrics.jsonl").touch()
    assert open_folder(folder, None) == f"{folder} contained an older run: moved to {folder}-1"
    assert sorted(path.name for path in folder.iterdir()) == [".launch", "launch.log"]
    assert [path.name for path in (tmp_path / "0-1").iterdir()] == ["metrics.jsonl"]
    assert (folder / ".launch" / "job.json").is_file()
