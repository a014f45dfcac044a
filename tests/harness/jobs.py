"""Runs of `python -m distopt.train` for the tests: every rank a process of its own, by fork or by the real launcher."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch.distributed import TCPStore

from tests.harness.forkserver import ENVIRONMENT, ROOT, context, without_preemption

BIN = Path(sys.executable).parent
# How many times longer than on a quiet machine a program may take, as for the ranks of `tests.harness.distributed`.
PATIENCE = float(os.environ.get("DISTOPT_TEST_SECONDS", "120")) / 120
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "sang",
    "songs",
)

# A run that a laptop ends in a second. Dropout and gradient accumulation are on where a test turns them on.
TINY = {
    "data": "text",
    "data.path": "text.txt",
    "data.cache_dir": "cache",
    "data.validation_fraction": "0.1",
    "model.config.n_layer": "2",
    "model.config.n_head": "2",
    "model.config.n_embd": "16",
    "model.config.n_positions": "64",
    "train.batch_size": "8",
    "train.sequence_length": "16",
    "train.steps": "12",
    "schedule.warmup_steps": "2",
    "evaluation.every": "6",
    "evaluation.max_sequences": "16",
    "evaluation.sample_tokens": "8",
    "evaluation.prompt": "the",
    "checkpoint.every": "4",
    "trackers": "[]",
}


def overrides(**changes: str | None) -> list[str]:
    """The words of a tiny run's command, changed: `train__steps="3"`; None leaves a word out."""
    wanted: dict[str, str | None] = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"{name}={value}" for name, value in wanted.items() if value is not None]


def write_text(folder: Path, words: int = 12000) -> Path:
    """Text that is quickly learnt a little: words of a small vocabulary, ten on a line."""
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=10)) for _ in range(words // 10))
    file = folder / "text.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Ended(NamedTuple):
    """What a process left: its exit code (negative: the signal that ended it) and what it wrote."""

    code: int | None
    out: str
    err: str


class Job:
    """The ranks of one run."""

    def __init__(self, processes: list[BaseProcess], files: list[tuple[Path, Path]], store: TCPStore | None) -> None:
        self.processes, self.files, self.store = processes, files, store

    def wait(self, seconds: float = 60.0) -> list[Ended]:
        """Every rank's end; AssertionError, and no process left over, if one does not end in time."""
        deadline = time.monotonic() + seconds * PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.kill()
        texts = [(out.read_text(), err.read_text()) for out, err in self.files]
        assert not late, f"ranks {late} did not end within {seconds} s: {texts}"
        return [Ended(process.exitcode, *text) for process, text in zip(self.processes, texts)]

    def kill(self) -> None:
        """SIGKILL to what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def start(
    cwd: Path, words: Sequence[str], world: int = 1, before: Callable[..., None] | None = None, *args: Any
) -> Job:
    """Starts `distopt.train` with these command line words on `world` ranks, with what torchrun would set.

    The processes are forked from one that has imported everything, which saves each some seconds.
    before: called with `args` in every rank first, to inject a fault or to watch.
    """
    # As torchrun does: the store is the launcher's, so there is no port that someone else could take in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
    logs = cwd / "logs" / str(time.monotonic_ns())
    logs.mkdir(parents=True)
    files = [(logs / f"{rank}.out", logs / f"{rank}.err") for rank in range(world)]
    processes: list[BaseProcess] = []
    for rank in range(world):
        environment = {} if store is None else torchrun(rank, world, store.port)
        process = context.Process(target=_rank, args=(cwd, words, environment, files[rank], before, args), daemon=True)
        process.start()
        processes.append(process)
    return Job(processes, files, store)


def one_after_another(
    cwd: Path, commands: Sequence[Sequence[str]], program: str = "distopt.train.job", find: bool = False
) -> list[Ended]:
    """What each of these commands leaves that ends by itself before it trains, all of them in one process.

    For commands that are refused: the same program from the same words, but without a start for each.
    find: modules in the folder are found, as by `python -m`.
    """
    file = cwd / "logs" / f"{time.monotonic_ns()}.json"
    file.parent.mkdir(exist_ok=True)
    process = fork(_one_after_another, cwd, commands, program, file, find)
    process.join(280.0 * PATIENCE)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"
    return [Ended(*ended) for ended in json.loads(file.read_text())]


def _one_after_another(cwd: Path, commands: Sequence[Sequence[str]], program: str, file: Path, find: bool) -> None:
    from distopt.job import cli
    from distopt.job.errors import one_line_errors

    module, _, name = program.rpartition(".")
    run = getattr(importlib.import_module(module), name)
    os.chdir(cwd)
    sys.path[:0] = [""] if find else []
    ended = []
    for words in commands:
        code, out, err = None, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                with one_line_errors(), cli.explained():
                    sys.argv = [module, *cli.model_words(list(words))]
                    run()
            except SystemExit as end:
                code = end.code
        ended.append([code, out.getvalue(), err.getvalue()])
    file.write_text(json.dumps(ended))


def torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """Returns what torchrun sets for a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    agent = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {name: str(number) for name, number in numbers.items()} | agent


def run(
    cwd: Path, words: Sequence[str], world: int = 1, before: Callable[..., None] | None = None, *args: Any
) -> list[Ended]:
    """`start`, to the end."""
    return start(cwd, words, world, before, *args).wait()


def train(
    cwd: Path, world: int = 1, before: Callable[..., None] | None = None, *args: Any, **changes: str
) -> list[Ended]:
    """A tiny run that has to succeed."""
    ended = run(cwd, overrides(**changes), world, before, *args)
    assert [rank.code for rank in ended] == [0] * world, "\n".join(rank.err for rank in ended)
    return ended


def _rank(
    cwd: Path,
    words: Sequence[str],
    environment: Mapping[str, str],
    files: tuple[Path, Path],
    before: Callable[..., None] | None,
    args: Sequence[Any],
) -> None:
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.chdir(cwd)
    os.environ.update(environment)
    without_preemption()
    sys.argv = ["distopt.train", *words]
    if before is not None:
        before(*args)
    from distopt.train import main

    main()


def python(*words: object, cwd: Path = ROOT, seconds: float = 120.0, **environment: str) -> Ended:
    """What `python -m MODULE WORDS` or `python -c PROGRAM WORDS` leaves, forked: a cold start imports for 4 s."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_python, args=([*map(str, words)], cwd, environment, files))
        process.start()
        ended = Job([process], [files], None).wait(seconds)
    return ended[0]


def _python(words: Sequence[str], cwd: Path, environment: Mapping[str, str], files: tuple[Path, Path]) -> None:
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.chdir(cwd)
    os.environ.update(environment)
    how, what, *sys.argv[1:] = words
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def fork(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Calls a module-level function in a process that has imported everything, without any GPU in sight."""
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


@contextlib.contextmanager
def launched(
    cwd: Path, words: Sequence[str], launcher: Sequence[str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """The real command, of which no process is left afterwards: (process, stdout, stderr)."""
    if launcher is None:
        local = ROOT / "launch" / "local.yaml"
        launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(local), "-m", "distopt.train"]
    logs = cwd / "logs" / str(time.monotonic_ns())
    logs.mkdir(parents=True)
    out, err = logs / "out", logs / "err"
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen([*launcher, *words], cwd=cwd, env=environment, stdout=stdout, stderr=stderr)
    try:
        yield process, out, err
    finally:
        kill_all(process.pid)
        process.wait(10)


def launch(cwd: Path, words: Sequence[str], launcher: Sequence[str] | None = None, seconds: float = 100.0) -> Ended:
    """The real command, to its end."""
    with launched(cwd, words, launcher) as (process, out, err):
        code = process.wait(seconds * PATIENCE)
    return Ended(code, out.read_text(), err.read_text())


def children(pid: int) -> list[int]:
    """The processes that a process has started. torchrun puts each worker into a process group of its own."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def kill_all(pid: int) -> None:
    """SIGKILL to a process and to all that it has started."""
    for child in [pid, *children(pid)]:
        if child != pid:
            kill_all(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
