"""Two machines on loopback, each an `accelerate launch` of its own, and stand-ins for the commands of SLURM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.jobs import BIN, ROOT, overrides
from tests.harness.runs import last_step, losses, until

MACHINES = ROOT / "launch" / "machines.yaml"
LONG = {"train__steps": "400", "evaluation__every": "400", "schedule": "constant", "schedule__warmup_steps": "0"}


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    jobs.write_text(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return tmp_path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def two_machines(cwd: Path, words: list[str]) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes, errors = [], []
        for machine in (0, 1):
            launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(MACHINES), "--num_machines", "2"]
            launcher += ["--num_processes", "2", "--machine_rank", str(machine), "--main_process_port", str(port)]
            process, _, err = stack.enter_context(jobs.launched(cwd, words, [*launcher, "-m", "distopt.train"]))
            processes.append(process)
            errors.append(err)
        yield processes, errors


@pytest.mark.matrix
@pytest.mark.parametrize("dead", [0, 1])
def test_a_machine_that_dies_ends_the_other_and_the_run_resumes(cwd: Path, dead: int) -> None:
    """kill -9 to everything of one machine: the other ends on its own, with an error, and nothing is lost.

    Machine 0 also has the rendezvous store. The resumed run has the losses of the uninterrupted one.
    """
    run = cwd / "runs" / "broken"
    words = overrides(name="broken", engine="fsdp2", checkpoint__every="4", **LONG)
    with two_machines(cwd, words) as (processes, _):
        until(lambda: last_step(run) > 5, lambda: processes[0].poll() is None and processes[1].poll() is None)
        jobs.kill_all(processes[dead].pid)
        killed = time.monotonic()
        assert processes[1 - dead].wait(60) not in (0, None)
        assert time.monotonic() - killed < 45  # torchrun gives a rank 30 s to end by itself
    end = max(4 * (last_step(run) // 4), 4) + 6
    short = {**LONG, "train__steps": str(end)}
    again = overrides(name="broken", engine="fsdp2", train__resume="auto", **short)
    with two_machines(cwd, again) as (processes, errors):
        assert [process.wait(150) for process in processes] == [0, 0], [err.read_text() for err in errors]
    jobs.train(cwd, 2, name="unbroken", engine="fsdp2", **short)
    assert losses(run) == losses(cwd / "runs" / "unbroken") and len(losses(run)) == end


@contextlib.contextmanager
def elastic(cwd: Path, port: int, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """One machine's launcher of two that meet at a port and restart what dies; the first one has the store."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
    counts = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    with jobs.launched(cwd, words, [str(BIN / "torchrun"), *meeting, *counts, "-m", "distopt.train"]) as (process, *_):
        yield process


def worker(launcher: subprocess.Popen[bytes]) -> int:
    """The process of a machine's rank, which has begun to train."""
    (found,) = jobs.children(launcher.pid)
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize("machine", [0, 1])
def test_a_rank_that_dies_brings_back_the_job_of_two_machines(cwd: Path, machine: int, resume: str) -> None:
    """kill -9 to one rank, twice. Their launchers do not count the same number of restarts."""
    run = cwd / "runs" / "broken"
    words = overrides(name="broken", engine="fsdp2", checkpoint__every="4", train__resume=resume, **LONG)
    with contextlib.ExitStack() as stack:
        port = free_port()
        launchers = [stack.enter_context(elastic(cwd, port, words))]
        launchers.append(stack.enter_context(elastic(cwd, port, words)))
        for reached in (5, 100):
            until(
                lambda step=reached: last_step(run) > step, lambda: all(each.poll() is None for each in launchers), 120
            )
            os.kill(worker(launchers[machine]), signal.SIGKILL)
        assert [launcher.wait(250) for launcher in launchers] == [0, 0]
    jobs.train(cwd, 2, name="unbroken", engine="fsdp2", **LONG)
    assert losses(run) == losses(cwd / "runs" / "unbroken") and len(losses(run)) == 400
    assert {path.name for path in (cwd / "runs").iterdir()} == {"broken", "unbroken"}  # nothing was moved aside


SRUN = """#!/usr/bin/env bash
# Starts the words on two nodes, which are this machine, forwards signals, and ends with the last non-zero exit code.
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_PROCID=$node "$@" &
  nodes+=($!)
done
trap 'kill -USR1 "${nodes[@]}"' USR1
code=0
for node in "${nodes[@]}"; do
  while kill -0 "$node" 2>/dev/null; do wait "$node"; ended=$?; done
  [ "$ended" -eq 0 ] || code=$ended
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >>requeued; fi
"""


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_slurm_script_saves_requeues_and_resumes(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Without SLURM: srun and scontrol are stand-ins that do the same with processes of this machine.

    SIGUSR1 comes before the time limit. SIGTERM, of a preemption, is followed by SLURM's own requeue.
    """
    requeued = ["requeue 7\n"] if number == signal.SIGUSR1 else []
    tools = cwd / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[0-1]", "GPUS_ON_NODE": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MAIN_PROCESS_PORT", str(free_port()))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    script = ["bash", str(ROOT / "launch" / "slurm.sh")]
    run = cwd / "runs" / "queued"

    with jobs.launched(cwd, overrides(name="queued", engine="fsdp2", **LONG), script) as (process, _, err):
        until(lambda: last_step(run) > 5, lambda: process.poll() is None)
        process.send_signal(number)
        assert process.wait(60) not in (0, None)
        stopped = last_step(run)
        assert f"distopt: stopped: by a signal, after step {stopped} of 400" in err.read_text()
    assert [file.read_text() for file in cwd.glob("requeued")] == requeued

    short = {**LONG, "train__steps": str(stopped + 5)}
    ended = jobs.launch(cwd, overrides(name="queued", engine="fsdp2", **short), script)
    assert ended.code == 0, ended.err
    assert f"resuming after step {stopped} from" in ended.out
    assert [file.read_text() for file in cwd.glob("requeued")] == requeued
    jobs.train(cwd, 2, name="unbroken", engine="fsdp2", **short)
    assert losses(run) == losses(cwd / "runs" / "unbroken") and len(losses(run)) == stopped + 5


@pytest.mark.matrix
def test_submitit_saves_requeues_and_resumes(cwd: Path) -> None:
    """By submitit's own executor for one machine, which requeues a job as SLURM does."""
    run = cwd / "runs" / "submitted"
    script = [sys.executable, str(ROOT / "launch" / "with_submitit.py"), "--cluster", "local", "--processes", "2"]
    with jobs.launched(cwd, overrides(name="submitted", engine="fsdp2", **LONG), script) as (process, out, err):
        until(lambda: last_step(run) > 5, lambda: process.poll() is None)
        (controller,) = jobs.children(process.pid)
        (task,) = jobs.children(controller)
        os.kill(task, signal.SIGUSR2)
        assert process.wait(100) == 0, err.read_text()
        log = Path(out.read_text().split()[-1]).read_text()
    assert "Requeued job" in log and "resuming after step" in log
    jobs.train(cwd, 2, name="unbroken", engine="fsdp2", **LONG)
    assert losses(run) == losses(cwd / "runs" / "unbroken") and len(losses(run)) == 400
