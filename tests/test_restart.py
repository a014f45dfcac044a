"""Automatic restarts: a job that dies comes back, and ends as the unbroken one; one that was refused does not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from distopt.job.restart import End, earlier_end
from tests.harness import jobs
from tests.harness.forkserver import ROOT
from tests.harness.jobs import BIN, overrides
from tests.harness.runs import last_step, rows, until

LOCAL = str(ROOT / "launch" / "local.yaml")
DIES = """
import os
from tests.harness import faults
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    faults.die_in_forward(7)
from distopt.train import main
main()
"""


@pytest.mark.matrix
@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_job_whose_rank_dies_ends_as_the_unbroken_one(cwd: Path, launcher: str, resume: str) -> None:
    (cwd / "dies.py").write_text(DIES)
    restarts = {
        "accelerate": [str(BIN / "accelerate"), "launch", "--config_file", LOCAL, "--max_restarts", "3"],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"],
    }
    words = overrides(name="dies", train__resume=resume, engine="fsdp2")
    ended = jobs.launch(cwd, words, [*restarts[launcher], str(cwd / "dies.py")], seconds=280)
    assert ended.code == 0, ended.err
    jobs.train(cwd, 2, name="unbroken", engine="fsdp2")
    assert rows(cwd / "runs" / "dies", losses_only=True) == rows(cwd / "runs" / "unbroken", losses_only=True)
    assert {path.name for path in (cwd / "runs").iterdir()} == {"dies", "unbroken"}  # nothing was moved aside


@pytest.mark.parametrize(
    ("content", "end"),
    [
        ({"message": "distopt: error: no", "timestamp": 1, "final": 1}, End("distopt: error: no", 1)),
        ({"message": "distopt: stopped: so", "timestamp": 1, "final": 75}, End("distopt: stopped: so", 75)),
        ({"message": "distopt: error: no space left", "timestamp": 1}, None),
        ({"message": {"message": "RuntimeError", "extraInfo": {}}}, None),
        (["of another program"], None),
    ],
)
def test_only_an_end_that_would_come_again_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, end: End | None
) -> None:
    before = tmp_path / "attempt_0" / "0" / "error.json"
    before.parent.mkdir(parents=True)
    before.write_text(json.dumps(content))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "1" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert earlier_end() == end
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert earlier_end() is None


@pytest.mark.matrix
def test_a_refused_job_is_not_tried_again(cwd: Path) -> None:
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", LOCAL, "--max_restarts", "2", "-m", "distopt.train"]
    ended = jobs.launch(cwd, overrides(train__batch_size="3"), launcher, seconds=280)
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if line.startswith("distopt: error:")]
    assert lines == ["distopt: error: train.batch_size=3 is not a multiple of the 2 processes"]


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=lambda number: number.name)
def test_no_process_outlives_its_launcher(cwd: Path, number: signal.Signals) -> None:
    run = cwd / "runs" / "orphans"
    words = overrides(name="orphans", train__steps="100000", checkpoint__every="100000")
    with jobs.launched(cwd, words) as (process, _, _):
        until(lambda: last_step(run) > 2, lambda: process.poll() is None, 200)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        process.wait(10)
        _, left = psutil.wait_procs(workers, timeout=60)
    assert not left
    (checkpoint,) = (run / "checkpoints").iterdir()  # they saved
    assert checkpoint.name == f"step_{last_step(run):08d}"
