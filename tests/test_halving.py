"""Successive halving in hydra/launcher=accelerate: which jobs stop at a rung, and what becomes of them."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_accelerate_launcher import _command as command
from hydra_plugins.hydra_accelerate_launcher import _sweep as sweep
from hydra_plugins.hydra_accelerate_launcher import accelerate_launcher
from hydra_plugins.hydra_accelerate_launcher._config import AccelerateLauncherConf
from hydra_plugins.hydra_accelerate_launcher._errors import LauncherError
from hydra_plugins.hydra_accelerate_launcher._halving import Halving, Stop
from hydra_plugins.hydra_accelerate_launcher._job import Job
from hydra_plugins.hydra_accelerate_launcher._places import Here
from omegaconf import OmegaConf

from tests.harness import jobs
from tests.harness.jobs import overrides


def wrote(folder: Path, *values: float, first: int = 1, metric: str = "loss") -> Path:
    """The rows of a job, one value for each step, among rows that have none."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, value in enumerate(values, start=first):
            file.write(json.dumps({"step": step, "lr": 0.1}) + "\n" + json.dumps({"step": step, metric: value}) + "\n")
    return folder


def test_the_best_half_goes_on_from_each_rung(tmp_path: Path) -> None:
    """Those that come first have nobody to be compared with; later ones have to be among the best half so far."""
    halving = Halving("loss", [2, 4])
    values = {0: 3.0, 1: 2.0, 2: 2.5, 3: 1.0, 4: 1.5, 5: 9.0}
    stops = {
        number: halving.judge(number, wrote(tmp_path / f"{number}", 7.0, value)) for number, value in values.items()
    }
    assert stops == {0: None, 1: None, 2: Stop(2, 2.5, 2, 3), 3: None, 4: None, 5: Stop(2, 9.0, 6, 6)}
    assert str(stops[2]) == "stopped at step 2: 2.5, number 2 of 3"
    assert halving.judge(1, wrote(tmp_path / "1", 2.0, 2.0, first=3)) is None
    assert halving.judge(3, wrote(tmp_path / "3", 1.0, 3.0, first=3)) == Stop(4, 3.0, 2, 2)


def test_a_job_is_at_a_rung_with_its_first_value_there_or_later(tmp_path: Path) -> None:
    halving = Halving("loss", [2])
    assert halving.judge(0, wrote(tmp_path / "0", 1.0, first=3)) is None
    assert halving.judge(1, wrote(tmp_path / "1", 0.0)) is None  # not there yet
    assert halving.judge(1, wrote(tmp_path / "1", 5.0, first=10)) == Stop(10, 5.0, 2, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_even_when_it_comes_first(tmp_path: Path, value: float) -> None:
    stop = Halving("loss", [1]).judge(0, wrote(tmp_path / "0", value))
    assert stop is not None and (stop.place, stop.jobs) == (1, 1)


def test_the_largest_is_the_best_where_it_is_said(tmp_path: Path) -> None:
    halving = Halving("accuracy", [1], greater_is_better=True)
    judged = [halving.judge(i, wrote(tmp_path / f"{i}", v, metric="accuracy")) for i, v in enumerate((0.5, 0.9, 0.2))]
    assert judged == [None, None, Stop(1, 0.2, 3, 3)]


def test_rows_are_read_once_and_only_when_they_are_complete(tmp_path: Path) -> None:
    halving, file = Halving("loss", [1]), wrote(tmp_path / "0") / "metrics.jsonl"
    file.write_text('not json\n{"step": "one", "loss": 1}\n[]\n{"step": 1, "lo')
    assert halving.judge(0, tmp_path / "0") is None
    with file.open("a") as more:
        more.write('ss": 4.0}\n')
    assert halving.judge(0, tmp_path / "0") is None
    assert halving.judge(1, wrote(tmp_path / "1", 5.0)) == Stop(1, 5.0, 2, 2)


def test_rows_of_another_run_in_the_same_folder_are_not_its_own(tmp_path: Path) -> None:
    folder = wrote(tmp_path / "0", math.nan)
    written = (folder / "metrics.jsonl").stat().st_mtime
    assert Halving("loss", [1]).judge(0, folder, since=written + 1) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": [200, 100]}, "hydra.launcher.rungs must be steps > 0 in increasing order, got [200, 100]"),
        ({"rungs": [0]}, "got [0]"),
        ({"rungs": [100], "keep": 1.0}, "hydra.launcher.keep must be > 0 and < 1, got 1.0"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(LauncherError, match=re.escape(message)):
        accelerate_launcher.check(AccelerateLauncherConf(**options))  # type: ignore[arg-type]


PROGRAM = """
import json, sys, time
value, steps = float(sys.argv[1]), int(sys.argv[2])
for step in range(1, steps + 1):
    open("metrics.jsonl", "a").write(json.dumps({"step": step, "loss": value}) + "\\n")
    time.sleep(0.05 if value < 3 else 60)
raise SystemExit("the end")
"""


def test_a_stopped_job_ends_early_and_returns_its_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes are real, but without a launcher, whose start takes seconds; a stopped job is done for ever."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("\\\\", "\\"))
    monkeypatch.setattr(command, "launch", lambda options, gpus: ["env", "-C", str(tmp_path / "now"), sys.executable])

    def job(number: int, value: float) -> Job:
        words = [str(tmp_path / "program.py"), str(value), "3"]
        result = JobReturn(overrides=[f"value={value}"], cfg=OmegaConf.create({"value": value}))
        return Job(number, result.overrides, f"value={value}", tmp_path / f"{number}", result, words)

    options, halving = AccelerateLauncherConf(rungs=[1], metric="loss", grace_seconds=1), Halving("loss", [1])
    for number, value in enumerate((2.0, 4.0)):
        (tmp_path / "now").unlink(missing_ok=True)
        (tmp_path / f"{number}").mkdir()
        (tmp_path / "now").symlink_to(tmp_path / f"{number}")
        (result,) = sweep.run([job(number, value)], options, halving, lambda: Here(options))
    assert result.return_value == 4.0
    told = capsys.readouterr().err
    assert "#0 value=2.0: failed: the end" in told.replace("SystemExit: ", "")  # the program has no return value
    assert "#1 value=4.0: stopped at step 1: 4, number 2 of 2" in told
    (again,) = sweep.run([job(1, 4.0)], options, Halving("loss", [1]), lambda: Here(options))
    assert again.return_value == 4.0 and "#1 value=4.0: 4, done before" in capsys.readouterr().err


@pytest.mark.matrix
def test_a_sweep_of_distopt_stops_the_worst(tmp_path: Path) -> None:
    """The learning rate of 1e-9 learns nothing: it stops at the first evaluation, and its checkpoint is there."""
    jobs.write_text(tmp_path)
    words = overrides(name="grid", optimizer__lr="1e-2,1e-9", train__steps="200", evaluation__every="2")
    command_ = [sys.executable, "-m", "distopt.train"]
    more = ["-m", "hydra/launcher=accelerate", "hydra.launcher.rungs=[20]"]
    ended = jobs.launch(tmp_path, [*more, *words], command_, 200.0)
    assert ended.code == 0, ended.err
    assert re.search(r"^#1 optimizer.lr=1e-09: stopped at step 20: [\d.]+, number 2 of 2, ", ended.err, re.M), ended.err
    assert (tmp_path / "runs/grid/1/checkpoints").is_dir()
    assert len(jobs.metrics(tmp_path / "runs/grid/1")) < 200
