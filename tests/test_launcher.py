"""`hydra/launcher=accelerate`: real sweeps of a script without distopt, and of `distopt.train`."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra_plugins.hydra_accelerate_launcher import accelerate_launcher, devices, log
from hydra_plugins.hydra_accelerate_launcher.config import AccelerateLauncherConf
from hydra_plugins.hydra_accelerate_launcher.errors import LauncherError
from hydra_plugins.hydra_accelerate_launcher.sweep import alone

from distopt.job.run_folder import open_folder
from tests.harness import jobs
from tests.harness.jobs import ROOT, metrics, overrides
from tests.harness.runs import last_step, losses, until

# Anybody's program. What it does is in its configuration; every process leaves a note of what it saw.
SCRIPT = """
import json, os, signal, time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base=VERSION_BASE, config_path=CONFIG_PATH, config_name="config")
def main(cfg):
    rank, folder = os.environ.get("RANK", "0"), Path(HydraConfig.get().runtime.output_dir)
    names = ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MASTER_PORT", "HYDRA_LAUNCHER_RESUME", "MINE")
    note = {"pid": os.getpid(), "cwd": os.getcwd(), "word": cfg.word, "job": HydraConfig.get().job.num}
    (folder / f"rank-{rank}.json").write_text(json.dumps(note | {name: os.environ.get(name) for name in names}))
    if cfg.do == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if cfg.do == "leave":
        os._exit(0)
    if cfg.x == 2 and os.environ.get("HYDRA_LAUNCHER_RESUME") != "auto":
        raise ValueError("two is not allowed")
    return float(cfg.x) ** 2 + 100 * int(rank)

if __name__ == "__main__":
    main()
"""
CONFIG = "x: 0\ndo: square\nword: from the file\nhydra: {sweep: {dir: out}}\n"
ENVIRONMENT = {**jobs.ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'distopt' / 'plugin'}"}
SWEEP = ["-m", "hydra/launcher=accelerate"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of this checkout with its plugin, whichever version is installed."""
    monkeypatch.setattr(jobs, "ENVIRONMENT", ENVIRONMENT)


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    return written(tmp_path)


def written(folder: Path, version_base: str = "1.3", config: str = "conf") -> list[str]:
    """The command of a script in a folder, with its configuration next to it."""
    text = SCRIPT.replace("VERSION_BASE", repr(version_base)).replace("CONFIG_PATH", repr(config))
    (folder / "script.py").write_text(text)
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").write_text(CONFIG)
    return [sys.executable, str(folder / "script.py")]


def notes(job: Path) -> list[dict[str, Any]]:
    """The records of the processes of a job, by rank."""
    return [json.loads(file.read_text()) for file in sorted(job.glob("rank-*.json"))]


def sweep(cwd: Path, command: list[str], *words: str, seconds: float = 100.0) -> jobs.Ended:
    return jobs.launch(cwd, [*SWEEP, *words], command, seconds)


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
        assert "python -m distopt.train -m hydra/launcher=accelerate" in line
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
    with alone(tmp_path / "out"):
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
def test_optuna_minimises_the_loss(tmp_path: Path) -> None:
    """Its trials are jobs; started again, it finds the finished ones and ends with the same result."""
    jobs.write_text(tmp_path)
    search = [
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=random",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
        "hydra.launcher.jobs=2",
        "optimizer.lr=tag(log,interval(1e-5,1e-1))",
    ]
    command, run = [sys.executable, "-m", "distopt.train"], tmp_path / "runs" / "search"
    words = [*overrides(name="search", train__steps="8"), *search]
    ended = sweep(tmp_path, command, *words, seconds=200)
    assert ended.code == 0, ended.err
    best = yaml.safe_load((run / "optimization_results.yaml").read_text())
    found = {}
    for number in range(4):
        rows = metrics(run / str(number))
        lr = yaml.safe_load((run / str(number) / "config.yaml").read_text())["optimizer"]["lr"]
        found[[row["validation_loss"] for row in rows if "validation_loss" in row][-1]] = lr
    assert len(found) == 4
    assert best["best_value"] == min(found)
    assert best["best_params"]["optimizer.lr"] == found[min(found)]

    again = sweep(tmp_path, command, *words, seconds=200)
    assert again.err.count("done before\n") == 4 and "started" not in again.err
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
