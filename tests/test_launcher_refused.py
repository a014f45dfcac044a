"""What hydra/launcher=accelerate refuses, and how it distributes GPUs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.hydra_accelerate_launcher import _devices as devices
from hydra_plugins.hydra_accelerate_launcher import _log as log
from hydra_plugins.hydra_accelerate_launcher import accelerate_launcher
from hydra_plugins.hydra_accelerate_launcher._alone import alone
from hydra_plugins.hydra_accelerate_launcher._config import AccelerateLauncherConf
from hydra_plugins.hydra_accelerate_launcher._errors import LauncherError

from tests.harness import jobs
from tests.harness.jobs import overrides
from tests.harness.launcher import sweep

# Refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "jobs": ({"jobs": 0}, "hydra.launcher.jobs must be >= 1, got 0"),
    "processes": ({"num_processes": 0}, "hydra.launcher.num_processes must be >= 1, got 0"),
    "grace": ({"grace_seconds": -1.0}, "hydra.launcher.grace_seconds must be >= 0, got -1"),
    "timeout": ({"timeout_minutes": 0.0}, "hydra.launcher.timeout_minutes must be > 0, got 0"),
    "file": ({"config_file": "nowhere.yaml"}, "hydra.launcher.config_file=nowhere.yaml: no such file"),
    "prefix": ({"prefix": ["nosuch"]}, "hydra.launcher.prefix: there is no command nosuch"),
    "machines": ({"num_machines": 2}, "hydra.launcher.num_machines=2 needs hydra.launcher.prefix"),
    "uneven": (
        {"num_machines": 2, "num_processes": 3, "prefix": ["env"], "main_process_ip": "a"},
        "3 processes on 2 machines",
    ),
    "port": ({"jobs": 2, "main_process_port": 29500}, "hydra.launcher.main_process_port must be null with jobs > 1"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LauncherError, match=re.escape(message)):
        accelerate_launcher.check(AccelerateLauncherConf(**options))


def test_a_missing_accelerate_is_refused_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LauncherError, match="needs Accelerate: pip install accelerate"):
        accelerate_launcher.check(AccelerateLauncherConf())


@pytest.mark.parametrize("variable", [("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")])
def test_ranks_do_not_each_start_the_sweep(variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch -m distopt.train -m ...` entered the sweep in every process, each with folders of its own."""
    monkeypatch.setenv(*variable)
    with pytest.raises(LauncherError, match="is started by python"):
        accelerate_launcher.check(AccelerateLauncherConf())


def test_ranks_do_not_each_run_the_sweep(tmp_path: Path) -> None:
    """Hydra's own launcher under `accelerate launch`: both processes ran all jobs, in the same folders."""
    jobs.write_text(tmp_path)
    words = ["-m", *overrides(name="grid", optimizer="adamw,lamb")]
    for rank, (code, out, err) in enumerate(jobs.run(tmp_path, words, 2)):
        assert (code, out) == (1, "")
        (line,) = err.strip().splitlines()
        assert line.startswith("distopt: error: " if rank == 0 else "distopt (rank 1): error: ")
        assert "each of the 2 processes of the launcher would start this sweep" in line
        assert "distopt sweep" in line
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_refusal_is_one_line(tmp_path: Path, script: list[str]) -> None:
    for words, message in {
        ("x=1,2", "hydra.sweep.subdir=same"): f"jobs #0 and #1 have the same folder {tmp_path}/out/same",
        ("x=1", "hydra.launcher.jobs=0"): "hydra.launcher.jobs must be >= 1, got 0",
        ("x=range(0)",): "the sweep x=range(0) has no jobs, because a range or a choice in it is empty",
        ("x=1", "hydra.launcher.job=2"): "Key 'job' not in 'AccelerateLauncherConf'",
    }.items():
        ended = sweep(tmp_path, script, *words)
        assert ended.code == 1 and "Traceback" not in ended.err
        assert any(line.strip().startswith(message) for line in ended.err.splitlines()), ended.err
    with alone(tmp_path / "out/.launch.lock", "sweep", ValueError):
        ended = sweep(tmp_path, script, "x=1")
    assert ended.code == 1 and f"another sweep runs in {tmp_path}/out: wait for it" in ended.err


@pytest.mark.parametrize(
    ("gpus", "count", "shares"),
    [
        ("0,1,2,3", 2, [["0", "1"], ["2", "3"]]),
        ("0,1,2,3,4,5,6,7", 3, [["0", "1"], ["2", "3"], ["4", "5"]]),
        ("GPU-a, GPU-b", 2, [["GPU-a"], ["GPU-b"]]),
        ("3", 1, [["3"]]),
        ("", 2, [[], []]),
        ("-1", 1, [[]]),
    ],
)
def test_gpus_are_distributed(gpus: str, count: int, shares: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert devices.deal(devices.visible(), count) == shares


def test_more_jobs_than_gpus_are_refused() -> None:
    with pytest.raises(LauncherError, match="jobs=3, but there are 2 GPUs"):
        devices.deal(["0", "1"], 3)


LOGS = {
    "a traceback": (
        "Traceback:\n  File x\nValueError: cause\n\nSet the environment variable HYDRA_FULL_ERROR=1",
        "ValueError: cause",
    ),
    "of a rank": ("[rank1]: torch.OutOfMemoryError: CUDA\nW1 torch\n", "torch.OutOfMemoryError: CUDA"),
    "what follows": (
        "KeyError: 'x'\nRuntimeError: [gloo] Connection closed by peer\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====",
        "KeyError: 'x'",
    ),
    "ours": ("train: 3%\rtrain: 4%\ndistopt: error: lr must be >= 0\n", "distopt: error: lr must be >= 0"),
    "the launchers": ("hydra/launcher=accelerate: error: 1 started\n", "hydra/launcher=accelerate: error: 1 started"),
    "none": ("starting\nSegmentation fault\n", "Segmentation fault"),
    "nothing": ("", "it wrote nothing"),
}


@pytest.mark.parametrize(("text", "expected"), LOGS.values(), ids=LOGS)
def test_the_line_with_the_reason_of_a_failure(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert log.error(tmp_path / "log") == expected
