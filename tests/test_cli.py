"""The commands themselves: `accelerate launch --config_file launch/local.yaml -m distopt.train`, with two processes."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image

from distopt.job import run_folder as runs
from distopt.job.config import CONF
from distopt.job.errors import one_line_errors
from distopt.job.records import read_metrics
from distopt.job.stop import SIGNALS
from tests.harness import jobs
from tests.harness.jobs import metrics, overrides
from tests.harness.runs import last_step, until

LONG = {"train__steps": "80", "evaluation__every": "80", "checkpoint__every": "10"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, jobs.Ended]:
    """One launch of two processes, and the folder that it was given in."""
    cwd = tmp_path_factory.mktemp("trained")
    jobs.write_text(cwd)
    words = overrides(name="first", engine="fsdp2", trackers="[tensorboard]", train__steps="16", optimizer__lr="1e-2")
    return cwd, jobs.launch(cwd, words)


def said(out: str, what: str) -> str:
    """What a finished run says under a heading such as `curves:`."""
    (found,) = re.findall(rf"^{what}:\s+(.*)$", out, re.MULTILINE)
    return found


def test_it_trains(trained: tuple[Path, jobs.Ended]) -> None:
    cwd, ended = trained
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err and "Warning" not in ended.err
    before, after, *bits = map(
        float,
        re.fullmatch(
            r"([\d.]+) -> ([\d.]+) nats per token, ([\d.]+) -> ([\d.]+) bits per byte",
            said(ended.out, "validation loss"),
        ).groups(),  # type: ignore[union-attr]
    )
    validation = [row["validation_loss"] for row in metrics(cwd / "runs" / "first") if "validation_loss" in row]
    assert (before, after) == (round(validation[0], 4), round(validation[-1], 4))
    assert bits == pytest.approx([before / math.log(2), after / math.log(2)], abs=2e-4)  # a token is a byte
    assert after < before - 0.3
    assert said(ended.out, "prompt") == "the" and said(ended.out, "sample").endswith("[after 8 tokens]")


def test_it_begins_with_what_it_is(trained: tuple[Path, jobs.Ended]) -> None:
    """And says each evaluation and checkpoint."""
    cwd, ended = trained
    for line in (
        "model       gpt2, 11,712 parameters",
        f"data        text: {cwd}/text.txt (1 files): ",
        "training    16 steps of 8 x 16 = 128 tokens: 2,048 tokens, 0.0",
        "optimizer   AdamW, lr 0.01, warmup_cosine",
        "devices     2 processes on the CPU",
        "engine      FSDP2 in fp32",
        "folder      runs/first",
    ):
        assert f"\n{line}" in ended.out
    numbers = r"validation loss [\d.]+, [\d.]+ bits per byte, accuracy [\d.]+%, in "
    steps = re.findall(rf"^step (\d+): {numbers}", ended.out, re.MULTILINE)
    assert steps == ["0", "6", "12", "16"]
    assert re.findall(r"^step \d+: checkpoint (\w+), in ", ended.out, re.MULTILINE)[-1] == "step_00000016"


def test_it_leaves_what_it_says(trained: tuple[Path, jobs.Ended]) -> None:
    cwd, ended = trained
    run = cwd / "runs" / "first"
    curves, checkpoint = Path(said(ended.out, "curves")), Path(said(ended.out, "checkpoint"))
    assert (curves, checkpoint) == (run / "curves.png", run / "checkpoints" / "step_00000016")
    with Image.open(curves) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # lines, and not an empty sheet
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step_00000012", "step_00000016"]
    assert OmegaConf.load(run / "config.yaml").optimizer.lr == 1e-2
    training = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 17))
    assert [row["tokens"] for row in training] == [128 * step for step in range(1, 17)]
    assert all(row["target_tokens"] == row["tokens"] and 0 <= row["token_accuracy"] <= 1 for row in training)
    names = {"loss", "token_accuracy", "lr", "grad_norm", "tokens", "target_tokens", "skipped"}
    assert set(training[0]) == {"step", *names, "tokens_per_second", "data_seconds"}


def test_tensorboard_has_the_same_numbers(trained: tuple[Path, jobs.Ended]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained[0] / "runs" / "first"
    (events,) = (run / "logs" / "distopt").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    for name in ("loss", "validation_loss", "lr", "grad_norm"):
        expected = [(row["step"], row[name]) for row in metrics(run) if name in row]
        got = [(event.step, event.value) for event in board.Scalars(name)]
        assert got == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_tensorboard_has_the_configuration(trained: tuple[Path, jobs.Ended]) -> None:
    (file,) = (trained[0] / "runs" / "first" / "logs").rglob("hparams.yml")
    written = OmegaConf.load(file)
    assert (written["train.steps"], written["optimizer.betas"], written["train.micro_batch_size"]) == (
        16,
        "[0.9, 0.95]",
        None,
    )


@pytest.mark.matrix
def test_the_printed_command_resumes(trained: tuple[Path, jobs.Ended]) -> None:
    """As it is printed, given to a shell in the same folder; but for the number of steps, to end sooner."""
    cwd, ended = trained
    command = said(ended.out, "resume")
    assert command.endswith("train.resume=auto train.steps=32")
    again = jobs.launch(cwd, [command.replace("train.steps=32", "train.steps=18")], ["bash", "-c"])
    assert again.code == 0, again.err
    assert "resuming after step 16" in again.out
    assert [row["step"] for row in metrics(cwd / "runs" / "first") if "loss" in row] == list(range(1, 19))
    assert not (cwd / "runs" / "first-1").exists()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.01)


@pytest.mark.matrix
def test_killed_workers_and_killed_launches(tmp_path: Path) -> None:
    """kill -9 of one worker: the launch ends, with an error. kill -9 of all: nothing ends well. Both go on.

    In the end there are the numbers of a run that nobody disturbed.
    """
    jobs.write_text(tmp_path)
    words, run = overrides(name="killed", **LONG), tmp_path / "runs" / "killed"

    def steps() -> int:
        """Steps that have left their metrics so far."""
        return max((row["step"] for row in read_metrics(run)), default=0)

    with jobs.launched(tmp_path, words) as (process, _, err):
        wait_for((run / "checkpoints" / "step_00000010").exists, process)
        workers = jobs.children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(60) not in (0, None)
        assert time.monotonic() - killed < 45  # torchrun gives the other rank 30 s to end by itself
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        assert "Signal 9 (SIGKILL)" in err.read_text()
    stopped = steps()
    assert 10 <= stopped < 75

    with jobs.launched(tmp_path, [*words, "train.resume=auto"]) as (process, _, _):
        wait_for(lambda: steps() > stopped + 5, process)
        jobs.kill_all(process.pid)
        assert process.wait(10) == -signal.SIGKILL
    assert steps() < 80

    out = jobs.train(tmp_path, 2, name="killed", train__resume="auto", **LONG)[0].out
    assert re.search(r"resuming after step \d+0 from", out)
    jobs.train(tmp_path, 2, name="undisturbed", **LONG)
    killed_run, undisturbed = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(tmp_path / "runs" / name) if "loss" in row]
        for name in ("killed", "undisturbed")
    )
    assert killed_run == undisturbed and len(killed_run) == 80


INTERRUPTED = "distopt: interrupted; train.resume=auto resumes from the last checkpoint\n"


def test_ctrl_c_to_every_rank_is_said_once(tmp_path: Path) -> None:
    """A rank that waited for the other showed a traceback, of a connection that was reset."""
    jobs.write_text(tmp_path)
    job = jobs.start(tmp_path, overrides(name="stopped", **{**LONG, "train__steps": "100000"}), 2)
    try:
        until(lambda: last_step(tmp_path / "runs" / "stopped") > 2, job.processes[1].is_alive)
        for process in job.processes:
            os.kill(process.pid or 0, signal.SIGINT)
        ended = job.wait(45)
    finally:
        job.kill()
    assert [rank.code for rank in ended] == [130, -signal.SIGINT]
    assert "".join(rank.err for rank in ended).count(INTERRUPTED) == 1
    assert not any("Traceback" in rank.err for rank in ended)


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", [None, [sys.executable, "-m", "distopt.train"]], ids=["two", "one"])
def test_ctrl_c_ends_every_process_with_one_line(tmp_path: Path, launcher: list[str] | None) -> None:
    """The launcher passes SIGINT on, and shows a traceback of its own."""
    jobs.write_text(tmp_path)
    run = tmp_path / "runs" / "stopped"
    words = overrides(name="stopped", **{**LONG, "train__steps": "100000"})
    with jobs.launched(tmp_path, words, launcher) as (process, _, err):
        wait_for((run / "checkpoints" / "step_00000010").exists, process)
        workers = jobs.children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(45) == (1 if launcher is None else 130)
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        text = err.read_text()
    assert text.count(INTERRUPTED) == 1
    assert "distopt/train.py" not in text  # no traceback of ours


# Refused before the processes meet, by what they are together, and by what only the first one looks at.
REFUSED = {
    "optimizer.lr=-1": "optimizer.lr must be a number >= 0, got -1",
    "train.batch_size=7": "train.batch_size=7 is not a multiple of the 2 processes",
    "train.resume=nowhere": "train.resume=nowhere: no such folder; give never, auto, or a checkpoint's folder",
}


@pytest.mark.matrix
@pytest.mark.parametrize(("word", "expected"), REFUSED.items(), ids=REFUSED)
def test_a_launch_with_bad_input_ends(tmp_path: Path, word: str, expected: str) -> None:
    """Each rank ends with 1 and one line, which torchrun repeats at the end of its report.

    A rank that is still busy with its imports when another one ends is ended by torchrun, with SIGTERM (-15): that each
    rank by itself ends with 1 is for `tests.test_train`.
    """
    jobs.write_text(tmp_path)
    ended = jobs.launch(tmp_path, [*overrides(), word], seconds=60)
    assert ended.code == 1
    report = ended.err[ended.err.index("distopt.train FAILED") :]
    codes = set(re.findall(r"exitcode  : (-?\d+) ", report))
    assert "1" in codes and codes <= {"1", "-15"}
    both = {f"distopt: error: {expected}", f"distopt (rank 1): error: {expected}"}
    said = set(re.findall(r"^distopt.*: error: .*$", ended.err, re.MULTILINE))
    assert said and said <= both
    assert any(line in report for line in said)
    assert "distopt/train.py" not in ended.err  # no traceback of ours
    assert not (tmp_path / "runs" / "train" / "metrics.jsonl").exists()


def test_help_names_every_group_and_how_to_start(tmp_path: Path) -> None:
    (ended,) = jobs.run(tmp_path, ["--help"])
    assert ended.code == 0
    for group in sorted(folder.name for folder in (jobs.ROOT / "conf").iterdir() if folder.is_dir()):
        assert re.search(rf"^{group}: \w+", ended.out, re.MULTILINE)
    assert "accelerate launch --multi_gpu --num_processes 2 -m distopt.train" in ended.out
    assert not (tmp_path / "runs").exists()


# The command that a run prints at its end


def recorded(words: list[str], processes: int = 1, folder: str = "runs/mine", **changes: str) -> list[str]:
    """The words of the command that a run of these words records."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", words, return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.choices, cfg.hydra.job.config_name = {}, "train"
    cfg.hydra.runtime.config_sources = [
        ConfigSourceInfo(path=str(CONF), schema="file", provider="main"),
        ConfigSourceInfo(path=str(Path("own conf").absolute()), schema="file", provider="command-line"),
    ]
    HydraConfig.instance().set_config(cfg)
    return shlex.split(runs.command(processes, Path(folder).absolute(), "mine", **changes))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "_distopt", lambda: ["distopt"])
    return tmp_path


def test_the_command_is_what_a_person_would_type(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Hydra's own flags it was refused: a choice of one's own folder was not found."""
    wanted = {"train__resume": "auto", "train__steps": "8"}
    given = ["name=mine", "train.steps=4", "train.resume=never", "sam=on", "hydra.job.chdir=false"]
    flags = ["--config-dir", "own conf", "hydra.job.chdir=false"]
    tail = ["name=mine", "sam=on", "train.resume=auto", "train.steps=8"]
    assert recorded(given, **wanted) == ["distopt", "train", *flags, *tail]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert recorded(given, 2, **wanted) == ["distopt", "train", "--processes", "2", *flags, *tail]


def test_the_command_of_a_job_of_a_sweep_names_its_folder(here: Path) -> None:
    """And nothing else of the sweep."""
    given, flags = ["name=mine", "hydra.sweep.dir=x", "hydra.job.num=3"], ["--config-dir", "own conf"]
    assert recorded(given, folder="runs/g/3") == ["distopt", "train", *flags, "name=mine", "hydra.run.dir=runs/g/3"]
    assert recorded(given, folder="it's/3")[-1] == "hydra.run.dir='it\\'s/3'"


def test_words_are_quoted_as_a_person_would() -> None:
    words = ["name=it's", "train.steps=4", "model.config={a: 1}", "name=$HOME", "a='b $c'"]
    shown = [runs._typed(word) for word in words]
    assert shown == ['"name=it\'s"', "train.steps=4", "'model.config={a: 1}'", "'name=$HOME'", shlex.quote(words[-1])]
    assert [shlex.split(each) for each in shown] == [[word] for word in words]


def test_the_command_names_a_program_that_the_shell_would_not_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make quickstart` runs what is in .venv without activating it: the bare name would be another Python, or none."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(jobs.BIN.parents[1])
    name = "/".join([*jobs.BIN.parts[-2:], "accelerate"])
    assert runs.program("accelerate") == name and Path(name).is_file()
    monkeypatch.chdir(tmp_path)
    assert runs.program("accelerate") == str(jobs.BIN / "accelerate")


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_an_error_is_one_line(
    rank: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its message has several; a launcher's TERM on the way out changes nothing."""
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise ValueError("steps must be >= 1,\n  got 0")
        now = {number: signal.getsignal(number) for number in SIGNALS}
        assert now == (handlers if rank is None else dict.fromkeys(SIGNALS, signal.SIG_IGN))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 1
    line = f"distopt{' (rank 1)' if rank == '1' else ''}: error: steps must be >= 1, got 0"
    assert capsys.readouterr() == ("", line + "\n")
    assert f'"message": "{line}"' in report.read_text()


def test_what_is_not_the_users_fault_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"), one_line_errors():
        raise RuntimeError("ours")
