"""`hydra/launcher=accelerate_slurm`: jobs that are SLURM jobs, of two nodes which are processes of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_accelerate_launcher import _command as command
from hydra_plugins.hydra_accelerate_launcher import _sweep as sweep
from hydra_plugins.hydra_accelerate_launcher import accelerate_launcher
from hydra_plugins.hydra_accelerate_launcher._config import SlurmLauncherConf
from hydra_plugins.hydra_accelerate_launcher._errors import LauncherError
from hydra_plugins.hydra_accelerate_launcher._halving import Halving
from hydra_plugins.hydra_accelerate_launcher._job import Job
from hydra_plugins.hydra_accelerate_launcher._slurm import Slurm
from omegaconf import OmegaConf

from tests.harness import jobs, slurm
from tests.harness.jobs import overrides
from tests.harness.runs import last_step, losses, until

# What a node runs, in place of `accelerate launch`, which takes seconds to start: it leaves a note, and returns what it
# is told to. "wait" ends by a signal, after it has saved; when it is started again, it returns.
PROGRAM = """
import json, os, pickle, signal, sys, time
what, value, *words = sys.argv[1:]
rank, folder = os.environ["SLURM_PROCID"], os.environ["NOTES"]
resume = os.environ["HYDRA_LAUNCHER_RESUME"]
with open(f"{folder}/{os.environ['SLURM_JOB_ID']}-{rank}.jsonl", "a") as file:
    file.write(json.dumps([words, resume, os.environ["MINE"], os.environ["HYDRA_LAUNCHER_PROCESSES"]]) + "\\n")
if what == "wait" and resume == "never":
    saved = lambda *_: sys.exit(75)
    signal.signal(signal.SIGUSR1, saved), signal.signal(signal.SIGTERM, saved)
    open(f"{folder}/waits-{os.environ['SLURM_JOB_ID']}-{rank}", "w").close()
    time.sleep(60)
if what == "fail":
    sys.exit("ValueError: not today")
if rank == "0":
    with open(os.environ["HYDRA_LAUNCHER_RESULT"], "wb") as file:
        pickle.dump(float(value), file)
"""
ODD = "$HOME `id` 'a' \"b\" %j \\ *"


class Cluster:
    """A cluster of stand-ins, and the jobs of a sweep on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.folder = folder / "slurm", folder / "out $x %j"
        for below in (self.folder, self.home):
            below.mkdir()
        monkeypatch.setenv("PATH", slurm.install(folder / "bin"))
        monkeypatch.setenv("FAKE_SLURM", str(self.home))
        monkeypatch.setenv("SLURM_NTASKS", "99")  # of an allocation, in which the sweep runs
        (folder / "program.py").write_text(PROGRAM)
        self.launch = [sys.executable, "-S", str(folder / "program.py")]
        monkeypatch.setattr(command, "launch_on_nodes", lambda options, processes: self.launch)

    def job(self, number: int, what: str, value: float = 0.0) -> Job:
        result = JobReturn(overrides=[f"x={number}"], cfg=OmegaConf.create({"x": number}))
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        return Job(number, result.overrides, f"x={number}", folder, result, [what, str(value), ODD, command.FIRST])

    def run(self, *some: Job, **options: Any) -> list[JobReturn]:
        env = {"NOTES": str(self.home.parent), "MINE": ODD}
        given = SlurmLauncherConf(**{"nodes": 2, "env": env, "poll_seconds": 0.1, "grace_seconds": 20.0, **options})
        accelerate_launcher.check(given)
        return sweep.run(some, given, Halving("loss", []), lambda: Slurm(given))

    def notes(self, number: int) -> list[list[Any]]:
        files = sorted(self.home.parent.glob(f"{number}-*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def waits(self, number: int) -> bool:
        both = all((self.home.parent / f"waits-{number}-{rank}").exists() for rank in (0, 1))
        return both and (self.home / f"{number}/state").read_text() == "RUNNING"

    def cancels(self) -> list[str]:
        file = self.home / "cancels"
        return file.read_text().splitlines() if file.exists() else []

    def when(self, condition: Callable[[], bool], then: Callable[[], Any]) -> threading.Thread:
        def wait() -> None:
            until(condition, lambda: True)
            then()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_each_job_is_a_slurm_job_of_two_nodes(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them fails: the same command submits only that one again. No shell has read a word."""
    more = {"gpus_per_node": 4, "partition": "gpu", "additional_parameters": {"mail-user": "$me", "exclusive": True}}
    first = cluster.run(cluster.job(0, "ok", 3.5), cluster.job(1, "fail"), **more)
    assert first[0].return_value == 3.5
    said = capsys.readouterr().err
    assert "#0 x=0: submitted as SLURM job 100, " in said and "#0 x=0: 3.5, " in said
    assert re.search(r"^#1 x=1: failed: ValueError: not today \(log: .*\), \d+\.\d s$", said, re.M), said
    assert "1 of 2 jobs failed: #1" in said
    for number in (100, 101):
        assert cluster.notes(number) == [[[[ODD, "127.0.0.1"], "never", ODD, "8"]]] * 2
    args = (cluster.home / "100/args").read_text().splitlines()
    log = str(cluster.folder / "0/launch.log").replace("%", "%%")
    for word in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", f"--output={log}", "--signal=B:USR1@120"):
        assert word in args
    assert {"--partition=gpu", "--mail-user=$me", "--exclusive", "--requeue", "--time=60"} <= {*args}
    assert "SLURM_NTASKS" not in (cluster.home / "100/env").read_text()

    again = cluster.run(cluster.job(0, "ok", 3.5), cluster.job(1, "ok", 4.5), **more)
    assert [result.return_value for result in again] == [3.5, 4.5]
    said = capsys.readouterr().err
    assert "#0 x=0: 3.5, done before" in said and "#1 x=1: submitted as SLURM job 102" in said
    assert cluster.notes(102)[0][0][1] == "auto"


def test_a_job_that_is_requeued_resumes(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Before its time limit the batch script receives SIGUSR1: the nodes save, and the job goes into the queue."""
    batch = cluster.home / "100/batch"
    thread = cluster.when(lambda: cluster.waits(100), lambda: os.kill(int(batch.read_text()), signal.SIGUSR1))
    (result,) = cluster.run(cluster.job(0, "wait", 2.0))
    thread.join()
    assert result.return_value == 2.0
    assert [[note[1] for note in notes] for notes in cluster.notes(100)] == [["never", "auto"]] * 2
    assert sorted(path.name for path in cluster.home.glob("[0-9]*")) == ["100"] and cluster.cancels() == []


def test_ctrl_c_cancels_the_jobs_of_the_sweep_alone(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """A running one saves first, a waiting one goes; somebody's other job stays. The same command resumes them."""
    other = cluster.home / "100"
    other.mkdir()
    (other / "state").write_text("RUNNING")

    def interrupt() -> None:
        (cluster.home / "full").touch()
        until(lambda: (cluster.home / "102").exists(), lambda: True)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    (cluster.home / "full").touch()
    released = cluster.when(lambda: (cluster.home / "101").exists(), (cluster.home / "full").unlink)
    thread = cluster.when(lambda: cluster.waits(101), interrupt)
    first = cluster.job(0, "wait", 1.0)
    second = cluster.job(1, "wait", 2.0)
    with pytest.raises(SystemExit) as ended:
        cluster.run(first, second)
    released.join(), thread.join()
    assert ended.value.code == 130
    assert "SIGINT: 0 of 2 jobs are done; the same command resumes" in capsys.readouterr().err
    assert {line.split()[-1] for line in cluster.cancels()} <= {"101", "102"}
    assert "--signal=TERM 101" in cluster.cancels() and (other / "state").read_text() == "RUNNING"
    until(lambda: (cluster.home / "102/state").read_text() in ("CANCELLED", "FAILED"), lambda: True)
    assert (cluster.home / "101/state").read_text() == "FAILED"  # and not cancelled: it has saved

    (cluster.home / "full").unlink(missing_ok=True)
    results = cluster.run(cluster.job(0, "wait", 1.0), cluster.job(1, "wait", 2.0))
    assert [result.return_value for result in results] == [1.0, 2.0]


def test_a_sweep_that_died_waits_for_its_jobs_again(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """They run on in SLURM; nothing is submitted twice. A job of another configuration is not taken for this one."""
    env = {"NOTES": str(cluster.home.parent), "MINE": ODD}
    (cluster.home / "full").touch()
    dead = Slurm(SlurmLauncherConf(nodes=2, env=env))
    assert dead.start(cluster.job(0, "ok", 7.0), 0) == "submitted as SLURM job 100"
    changed = cluster.job(0, "ok", 7.0)
    changed.result.cfg.x = 5
    cluster.run(changed)
    told = capsys.readouterr().err
    assert f"#0 x=0: failed: an earlier job runs in {cluster.folder}/0: scancel 100, and give the command again" in told
    thread = cluster.when(lambda: True, lambda: (time.sleep(0.5), (cluster.home / "full").unlink()))
    (result,) = cluster.run(cluster.job(0, "ok", 7.0))
    thread.join()
    assert result.return_value == 7.0 and "#0 x=0: is SLURM job 100, " in capsys.readouterr().err
    assert len(list(cluster.home.glob("[0-9]*"))) == 1


def test_what_slurm_refuses_has_failed(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = cluster.run(cluster.job(0, "ok"), partition="nosuch")
    said = "SLURM refuses the job: sbatch: error: Batch job submission failed: no partition"
    assert f"#0 x=0: failed: {said}" in capsys.readouterr().err and said in str(result._return_value)


def test_each_node_runs_the_same_command() -> None:
    words = command.launch_on_nodes(SlurmLauncherConf(nodes=2, args=["--mixed_precision", "bf16"]), 16)
    assert " ".join(words[1:]) == (
        "-m accelerate.commands.launch --num_processes 16 --multi_gpu --num_machines 2 --machine_rank 1 "
        "--rdzv_backend c10d --main_process_ip $first_node --main_process_port $port --mixed_precision bf16"
    )
    one = command.launch_on_nodes(SlurmLauncherConf(), 1)
    assert " ".join(one[3:]) == "--num_processes 1 --num_machines 1 --main_process_port 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "hydra.launcher.nodes must be >= 1, got 0"),
        ({"processes_per_node": 0}, "hydra.launcher.processes_per_node must be >= 1, got 0"),
        ({"poll_seconds": 0.0}, "hydra.launcher.poll_seconds must be > 0, got 0"),
        ({"timeout_min": 2}, "hydra.launcher.signal_delay_s must be < 120, the seconds of timeout_min, got 120"),
        ({"additional_parameters": {"Mail User": 1}}, "'Mail User' is no option of sbatch"),
        ({"env": {"A B": "1"}}, "hydra.launcher.env: 'A B' is no name of a variable"),
        ({"main_process_port": 29500}, "hydra.launcher.main_process_port must be null with jobs > 1"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LauncherError, match=re.escape(message)):
        accelerate_launcher.check(SlurmLauncherConf(**options))


def test_a_machine_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LauncherError, match="there is no command sbatch; start the sweep on a machine of the cluster"):
        Slurm(SlurmLauncherConf())


@pytest.mark.matrix
def test_a_sweep_of_distopt_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank on each; the first job is asked to save, requeued, and has the losses of the unbroken run."""
    jobs.write_text(tmp_path)
    home = tmp_path / "slurm"
    monkeypatch.setenv("PATH", slurm.install(tmp_path / "tools"))
    monkeypatch.setenv("FAKE_SLURM", str(home))
    long = {"train__steps": "300", "evaluation__every": "300", "checkpoint__every": "300", "engine": "fsdp2"}
    words = ["-m", "hydra/launcher=accelerate_slurm", "hydra.launcher.nodes=2", "hydra.launcher.poll_seconds=1"]
    words += overrides(name="'g $rid'", optimizer__lr="1e-2,1e-3", **long)
    run = tmp_path / "runs/g $rid"
    with jobs.launched(tmp_path, words, [sys.executable, "-m", "distopt.train"]) as (process, _, err):
        until(lambda: (run / "0").is_dir() and last_step(run / "0") > 5, lambda: process.poll() is None, 240)
        os.kill(int((home / "100/batch").read_text()), signal.SIGUSR1)
        assert process.wait(300) == 0, err.read_text()
    assert "resuming after step" in (run / "0/launch.log").read_text()
    assert (home / "cancels").exists() is False
    for number, lr in enumerate(("1e-2", "1e-3")):
        jobs.train(tmp_path, 2, name=f"alone-{number}", optimizer__lr=lr, **long)
        assert losses(run / str(number)) == losses(tmp_path / f"runs/alone-{number}")
