"""The command `distopt`: which program its words become, and that it answers before torch is imported."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from distopt import __version__
from distopt.command import start
from distopt.command.main import ENTRIES, main
from distopt.command.words import completed, groups
from tests.harness.jobs import BIN, ENVIRONMENT, ROOT


class Became(Exception):
    """Raised in place of the program, with its words after Python's own."""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A folder, and an environment without a launcher and without GPUs."""

    def execv(path: str, words: list[str]) -> None:
        assert path == words[0] == sys.executable
        raise Became(words[1:])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return monkeypatch


def became(line: str, shell: pytest.MonkeyPatch) -> str:
    """The words of the program that a command becomes."""
    shell.setattr(sys, "argv", line.split())
    with pytest.raises(Became) as program:
        main()
    return " ".join(program.value.args[0])


def ended(line: list[str], shell: pytest.MonkeyPatch) -> Any:
    """The exit code of a command that becomes no program."""
    shell.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


TRAIN, SEVERAL = "-m distopt.train", "-m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0"
SEVERAL += " --mixed_precision no --dynamo_backend no --num_processes"
PROGRAMS = {
    "distopt train name=a +x.y=[1,2]": f"{TRAIN} name=a +x.y=[1,2]",
    "distopt train --processes 2 name=a": f"{SEVERAL} 2 {TRAIN} name=a",
    "distopt train name=a --processes=2": f"{SEVERAL} 2 {TRAIN} name=a",
    "distopt train --processes 1 name=a": f"{TRAIN} name=a",
    "distopt train --config-dir mine --cfg job": f"{TRAIN} --config-dir mine --cfg job",
    "distopt train --help": f"{TRAIN} --help",
    "distopt finetune model.path=x": f"{TRAIN} experiment=finetune model.path=x",
    "distopt finetune experiment=mine": f"{TRAIN} experiment=mine",
    "distopt sweep lr_scale=1,3": f"{TRAIN} -m hydra/launcher=accelerate lr_scale=1,3",
    "distopt sweep --processes 2 lr_scale=1,3": (
        f"{TRAIN} -m hydra/launcher=accelerate hydra.launcher.num_processes=2 lr_scale=1,3"
    ),
    "distopt sweep --processes 2 hydra/launcher=accelerate_slurm lr_scale=1,3": (
        f"{TRAIN} -m hydra.launcher.processes_per_node=2 hydra/launcher=accelerate_slurm lr_scale=1,3"
    ),
    "distopt sweep -m hydra/launcher=joblib x=1": f"{TRAIN} -m hydra/launcher=joblib x=1",
    "distopt prepare --processes 2 data=text": "-m distopt.prepare --processes 2 data=text",
    "distopt export a b --dtype bfloat16": "-m distopt.export a b --dtype bfloat16",
    "distopt verify --help": "-m distopt.verify --help",
    "distopt launch --num_processes 16 --main_process_ip h name=a": (
        f"-m accelerate.commands.launch --num_processes 16 --main_process_ip h {TRAIN} name=a"
    ),
    "distopt launch --config_file=x -- --cfg job": f"-m accelerate.commands.launch --config_file=x {TRAIN} --cfg job",
    "distopt launch --help": "-m accelerate.commands.launch --help",
}


@pytest.mark.parametrize(("line", "program"), PROGRAMS.items(), ids=PROGRAMS)
def test_a_command_becomes_its_program(line: str, program: str, shell: pytest.MonkeyPatch) -> None:
    """With its words untouched, so that exit codes, signals and Hydra's overrides are those of `python -m`."""
    assert became(line, shell) == program


def test_on_several_gpus_it_trains_on_all_of_them(
    shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And says the command that does it; not for what prints only, in a sweep, or under a launcher."""
    shell.setattr(start, "gpus", lambda: 4)
    assert became("distopt train name=a", shell) == f"{SEVERAL} 4 {TRAIN} name=a"
    assert (
        capsys.readouterr().err
        == f"distopt: {SEVERAL.replace('-m accelerate.commands.', 'accelerate ')} 4 {TRAIN} name=a\n"
    )
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.yaml").touch()
    launch = "-m accelerate.commands.launch --config_file launch/local.yaml --num_processes 4"
    assert became("distopt train name=a", shell) == f"{launch} {TRAIN} name=a"
    for words in ("--help", "--cfg job", "--cfg=job", "-m lr_scale=1,3", "hydra.mode=MULTIRUN"):
        assert became(f"distopt train {words}", shell) == f"{TRAIN} {words}"
    shell.setenv("WORLD_SIZE", "8")
    assert became("distopt train name=a", shell) == f"{TRAIN} name=a"


@pytest.mark.parametrize(("listed", "count"), [("", 0), ("-1", 0), ("0", 1), ("1, 3", 2), ("GPU-8f,MIG-2", 2)])
def test_visible_gpus_are_counted(listed: str, count: int, shell: pytest.MonkeyPatch) -> None:
    shell.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert start.gpus() == count


def test_windows_is_told_what_to_use(shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Instead of a traceback about a module that it does not have; `--version` and `--help` answer anywhere."""
    shell.setattr(sys, "platform", "win32")
    assert ended(["distopt", "plan"], shell) == 1
    assert capsys.readouterr().err.endswith("on Windows use WSL 2\n")
    assert ended(["distopt", "train", "--version"], shell) == 0


REFUSED = {
    "trian x=1": (2, "there is no command trian: did you mean train? There are train, finetune, sweep"),
    "zzz": (2, "there is no command zzz. There are train"),
    "--nonsense": (2, "No such option"),
    "completion tcsh": (2, "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    "train --processes 0": (1, "--processes must be an integer >= 1, got 0"),
    "train --processes": (1, "--processes must be an integer >= 1, got nothing"),
    "sweep --processes two": (1, "--processes must be an integer >= 1, got two"),
    "train --processes 2 --processes=3": (1, "--processes is given twice: give it once"),
    "sweep --processes 2 hydra/launcher=joblib": (
        1,
        "--processes is not for hydra/launcher=joblib: leave it out, or choose hydra/launcher=accelerate",
    ),
    "sweep --processes 2 hydra.launcher.num_processes=4": (
        1,
        "--processes and hydra.launcher.num_processes=4 say the same: give one of them",
    ),
    "train --processes 2 -m x=1,2": (
        1,
        "--processes is for one run; for those of a sweep: distopt sweep --processes 2",
    ),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.items(), ids=REFUSED)
def test_bad_words_are_one_line(
    words: str, expected: tuple[int, str], shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = expected
    assert ended(["distopt", *words.split()], shell) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("distopt: error: ") and message in err


def test_alone_it_says_what_to_do_next(shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["distopt"], shell) in (0, None)
    first = capsys.readouterr().out
    assert "distopt train experiment=quickstart" in first and "distopt sample" not in first
    for name in ("old", "new"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").touch()
    os.utime("runs/old", (1, 1))
    ended(["distopt"], shell)
    assert 'distopt sample runs/new "Once"' in capsys.readouterr().out


COMPLETED = {
    ("train", "optimizer=adamw_s"): ["optimizer=adamw_schedule_free"],
    ("train", "optimi"): ["optimizer="],
    ("train", "train.batch"): ["train.batch_size=", "train.batch_schedule="],
    ("sweep", "optimizer=lamb,lar"): ["optimizer=lamb,lars"],
    ("plan", "gpus"): ["gpus_per_node="],
    ("report", "runs/b"): ["runs/book"],
}


@pytest.mark.parametrize(("words", "expected"), COMPLETED.items(), ids=map(" ".join, COMPLETED))
def test_words_are_completed(words: tuple[str, str], expected: list[str], shell: pytest.MonkeyPatch) -> None:
    for name in ("book", "cat"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").touch()
    command, incomplete = words
    items = completed(command, ENTRIES[command].configured, [], incomplete)
    assert [item.value for item in items] == expected


def test_bash_completes_the_value_of_a_word_that_it_has_split() -> None:
    for incomplete, before in (("ada", ["optimizer", "="]), ("", ["optimizer"])):
        found = [item.value for item in completed("train", True, before, incomplete)]
        assert found == [name for name in groups()["optimizer"] if name.startswith(incomplete)]
    (item,) = completed("train", True, ["data.path", "="], "boo")
    assert (item.type, item.value) == ("file", "boo")


MISTYPED = {
    "optimzer=lamb": "there is no optimzer: did you mean optimizer?",
    "optimizer=lamv": "optimizer=lamv: there is no such optimizer: did you mean lamb?",
    "train.stepz=3": "there is no train.stepz: did you mean steps?",
    "steps=3": "there is no steps: did you mean train.steps?",
    "path=book.txt": "there is no path: did you mean model.path or data.path?",
    "train.steps=-1": "train.steps must be an integer >= 1 or null, got -1",
    "train.batch_size=5": "train.batch_size=5 is not a multiple of the 2 processes",
    "train.epochs=2 train.steps=3": "train.steps=3 and train.epochs=2: give one of them, and null for the other",
    "train.steps=100": "warmup longer than the run: schedule.warmup_steps must be less than train.steps = 100, got 100",
    "schedule=warmup_stable_decay train.steps=150": "schedule.decay_steps must be at most 50, what train.steps = 150",
    "evaluation.every=10 checkpoint.every=15 checkpoint.best=validation_loss": "checkpoint.best=validation_loss needs",
    "train.batch_schedule={10:33}": "train.batch_schedule has 33 sequences from step 10 on, which is not a multiple",
    "--proceses 3": "there is no option --proceses: did you mean --processes?",
    "sam.rho=1": "there is no sam.rho: what is chosen for sam has no keys",
}


def test_what_is_mistyped_never_reaches_the_launcher(
    shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """torchrun reported it for every process, after seconds, in twenty lines."""
    commands = {words: ["train", "--processes", "2", *words.split()] for words in MISTYPED}
    commands["optimzer=lamb"] = ["launch", "--num_processes", "2", "optimzer=lamb"]
    for word, words in commands.items():
        assert ended(["distopt", *words], shell) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"distopt: error: {MISTYPED[word]}")
    assert list(tmp_path.iterdir()) == []


# What a person types, up to TAB, and what each shell is asked for it. Completion in zsh needs a terminal, so there the
# script is read, and the program is called as the script calls it.
TYPED, OFFERED = "distopt train optimizer=ada", ["adafactor", "adagrad", "adam", "adamw", "adamw_schedule_free"]
SHELLS = {
    "bash": "source ./script; COMP_WORDS=(distopt train optimizer = ada) COMP_CWORD=4; _distopt_completion distopt;"
    ' printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": f"source ./script; complete -C '{TYPED}'",
    "zsh": f"zsh -n ./script && _DISTOPT_COMPLETE=zsh_complete COMP_WORDS='{TYPED}' COMP_CWORD=2 distopt",
}


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_completes(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    env = {**os.environ, **ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = subprocess.run(["distopt", "completion", name], env=env, capture_output=True, text=True, check=True).stdout
    (tmp_path / "script").write_text(script)
    done = subprocess.run([name, "-c", SHELLS[name]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    offered = [line.removeprefix("optimizer=") for line in done.stdout.split() if line not in ("plain", "_")]
    assert offered == OFFERED, done.stderr


PROBE = """
import contextlib, json, sys, time
began, sys.argv = time.process_time(), ["distopt", *sys.argv[1:]]
from distopt.command.main import main
with contextlib.suppress(SystemExit):
    main()
print(json.dumps([time.process_time() - began, [m for m in sys.modules if m in ("torch", "hydra", "numpy")]]))
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--version"], ["completion", "bash"]], ids=" ".join)
def test_it_answers_without_torch(words: list[str], tmp_path: Path) -> None:
    """In less than 0.3 s of CPU time."""
    command = [sys.executable, "-W", "error", "-c", PROBE, *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=60, check=True
    )
    *out, last = done.stdout.splitlines()
    seconds, modules = json.loads(last)
    assert seconds < 0.3 and modules == []
    expected = {"--help": "prepare", "train": f"distopt {__version__}", "completion": "_DISTOPT_COMPLETE=bash_complete"}
    assert expected[words[0]] in "\n".join(out)


NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.modules["torch"] = sys.modules["numpy"] = None  # to import one of them fails
runpy.run_module(sys.argv[0], run_name="__main__")
"""
# The exit code, and the beginning of a line.
ANSWERS = {
    "distopt.train --help": (0, "keys (KEY=VALUE), with their values now"),
    "distopt.train optimizer=lamb optimizer.lr=1 --help": (0, "optimizer.lr=1 "),
    "distopt.train optimizer=lamv": (
        1,
        "distopt: error: optimizer=lamv: there is no such optimizer: did you mean lamb?",
    ),
    "distopt.train train.steps=0": (1, "distopt: error: train.steps must be an integer >= 1"),
    "distopt.plan --help": (0, "cluster.memory_gib=80"),
    "distopt.train optimizer=lamb --cfg job train.steps=3": (0, "train:"),  # a flag between overrides
    "distopt.prepare train.steps=0": (1, "distopt: error: train.steps must be an integer >= 1"),
    "distopt.sample runs/boook Once": (1, "distopt: error: runs/boook: no such folder; give a run"),
    "distopt.jacobian folder --tokens 0": (1, "distopt: error: --tokens must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize(("words", "expected"), ANSWERS.items(), ids=ANSWERS)
def test_help_and_mistakes_do_not_wait_for_torch(words: str, expected: tuple[int, str], tmp_path: Path) -> None:
    """What is left is Hydra, which composes the configuration in less than a second, on a busy machine too."""
    code, line = expected
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command, env = [sys.executable, "-c", NO_TORCH, *words.split()], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert f"\n{line}" in "\n" + done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0


# What is no subcommand, and has a program of its own. `distopt launch --help` is that of Accelerate.
OTHERS = {"jacobian": "-m distopt.jacobian --help", "sharpness": "-m distopt.sharpness --help"}


@pytest.mark.parametrize("name", [*(name for name in ENTRIES if name != "launch"), *OTHERS])
def test_help_of_every_command_is_there_before_torch(name: str, shell: pytest.MonkeyPatch) -> None:
    """It took 2 to 4 seconds where a program imported what it works with before it read its words."""
    module, *words = (OTHERS.get(name) or became(f"distopt {name} --help", shell)).split()[1:]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command, env = [sys.executable, "-W", "error", "-c", NO_TORCH, module, *words], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert seconds < (1.0 if name in ENTRIES and ENTRIES[name].configured else 0.3)


def test_help_lists_the_choices_of_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("_target_: torch.optim.NAdam\n_partial_: true\nlr: 1e-3\n")
    command = [
        sys.executable,
        "-c",
        NO_TORCH,
        "distopt.train",
        "--config-dir",
        str(tmp_path),
        "optimizer=mine",
        "--help",
    ]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("optimizer: "))
    ours = {file.stem for file in (ROOT / "conf" / "optimizer").glob("*.yaml")}
    assert set(line.removeprefix("optimizer: ").split(", ")) == ours | {"mine"}


@pytest.mark.parametrize("columns", [80, 200])
def test_help_is_broken_for_the_terminal(columns: int, tmp_path: Path) -> None:
    """Lines of up to 250 characters were broken by the terminal, in the middle of words."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {**os.environ, **ENVIRONMENT}
    env.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", NO_TORCH, "distopt.train", "--help"], cwd=tmp_path, env=env, stdout=theirs
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
        while piece := os.read(ours, 65536):
            text += piece
    os.close(ours)
    assert process.wait(60) == 0
    lines = text.decode().replace("\r\n", "\n").splitlines()
    assert len(lines) > 80
    long = [line for line in lines if len(line) > columns and " " in line.strip() and "={" not in line]
    assert long == []
    (lr,) = (number for number, line in enumerate(lines) if line.startswith("optimizer.lr="))
    meaning = "the learning rate, before the schedule (a number >= 0)"
    assert lines[lr].endswith(meaning) if columns == 200 else lines[lr + 1] == " " * 6 + meaning


def test_the_console_script_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '\n[project.scripts]\ndistopt = "distopt.command.main:main"\n' in text
