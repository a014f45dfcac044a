"""How the programs start: this process becomes them, so that signals and exit codes are theirs."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from distopt.version import __version__

LOCAL = Path("launch/local.yaml")
PROCESSES = "--processes"
# What says the number of processes of a run, or of each of its nodes, by launcher.
_PROCESSES_OF = {"accelerate": "num_processes", "accelerate_slurm": "processes_per_node"}
# Words with which Hydra prints something, or starts a sweep, instead of one run.
_NO_RUN = "-m --multirun -h --help --hydra-help -c --cfg -i --info -sc --shell-completion -p --package --resolve"


def become(words: list[str]) -> NoReturn:
    """Replaces this process by Python with some words.

    `--version` is answered here, for every program.

    Raises:
        ValueError: On Windows, which has neither the signals nor the locks that they use.
    """
    if words[2:] == ["--version"]:
        print(f"distopt {__version__}")
        sys.exit(0)
    if sys.platform == "win32":
        raise ValueError("distopt's programs need Linux, or macOS, where they train on the CPU: on Windows use WSL 2")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words])


def train(words: list[str]) -> NoReturn:
    """Trains on all GPUs of this machine, in one process on the CPU, or in as many as `--processes` says.

    Under a launcher, as of SLURM or torchrun, this is one of its processes.

    Raises:
        ValueError: `--processes` is no integer >= 1, or is given with a sweep.
    """
    processes, words = taken(words)
    run = _is_run(words)
    if processes is not None and not run:
        raise ValueError(f"{PROCESSES} is for one run; for those of a sweep: distopt sweep {PROCESSES} {processes} ...")
    if not run or "WORLD_SIZE" in os.environ:
        become(["-m", "distopt.train", *words])
    if processes is None:
        processes = max(1, gpus())
    if processes == 1:
        if sys.stderr.isatty():
            print("distopt: one process, loading PyTorch", file=sys.stderr)
        become(["-m", "distopt.train", *words])
    _refuse(words, processes)
    _accelerate([*single_machine(processes), "-m", "distopt.train", *words])


def finetune(words: list[str]) -> NoReturn:
    """Trains as `train` does, with `experiment=finetune` unless another one is chosen."""
    chosen = any(word.startswith("experiment=") for word in words)
    train(words if chosen else ["experiment=finetune", *words])


def sweep(words: list[str]) -> NoReturn:
    """Trains once for each combination of values, by distopt's launcher unless another one is chosen.

    Raises:
        ValueError: `--processes`, the number of processes of each run, or of each node of a run in SLURM, is no integer
            >= 1, or the launcher starts one process, or is told their number twice.
    """
    processes, words = taken(words)
    options = [] if {"-m", "--multirun"} & {*words} else ["-m"]
    launcher = next((word.partition("=")[2] for word in reversed(words) if word.startswith("hydra/launcher=")), "")
    if not launcher:
        options.append("hydra/launcher=accelerate")
    if processes is not None:
        options.append(f"{_processes_key(launcher or 'accelerate', words)}={processes}")
    become(["-m", "distopt.train", *options, *words])


def _processes_key(launcher: str, words: list[str]) -> str:
    """The key of a launcher that says what `--processes` does."""
    if launcher not in _PROCESSES_OF:
        known = " or ".join(f"hydra/launcher={name}" for name in _PROCESSES_OF)
        raise ValueError(f"{PROCESSES} is not for hydra/launcher={launcher}: leave it out, or choose {known}")
    key = f"hydra.launcher.{_PROCESSES_OF[launcher]}"
    for word in words:
        if word.lstrip("+").startswith(f"{key}="):
            raise ValueError(f"{PROCESSES} and {word} say the same: give one of them")
    return key


def launch(words: list[str]) -> NoReturn:
    """Trains by `accelerate launch`: its options, then the configuration from the first KEY=VALUE on, or after `--`."""
    first = next((i for i, word in enumerate(words) if word == "--" or (word[:1] != "-" and "=" in word)), len(words))
    options, rest = words[:first], words[first:]
    if {"-h", "--help"} & {*options}:
        _accelerate(options)
    words = rest[rest[:1] == ["--"] :]
    if _is_run(words):
        _refuse(words)
    _accelerate([*options, "-m", "distopt.train", *words])


def single_machine(processes: int) -> list[str]:
    """Returns the options of `accelerate launch` for some processes on this machine, with or without GPUs."""
    if LOCAL.is_file():
        return ["--config_file", str(LOCAL), "--num_processes", str(processes)]
    # What is not given, Accelerate 1.15 warns of. Without --multi_gpu it starts one process, on the CPU too.
    known = "--multi_gpu --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    return [*known.split(), "--num_processes", str(processes)]


def taken(words: list[str]) -> tuple[int | None, list[str]]:
    """Takes `--processes N` out of some words.

    Returns:
        N, None if it is not there; and the other words.

    Raises:
        ValueError: N is no integer >= 1, or there are two of them.
    """
    kept, number = [], None
    given = iter(words)
    for word in given:
        name, sign, value = word.partition("=")
        if name != PROCESSES:
            kept.append(word)
            continue
        if number is not None:
            raise ValueError(f"{PROCESSES} is given twice: give it once")
        number = value if sign else next(given, "")
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise ValueError(f"{PROCESSES} must be an integer >= 1, got {number or 'nothing'}")
    return None if number is None else int(number), kept


def _is_run(words: list[str]) -> bool:
    given = {*words, *(word.partition("=")[0] for word in words)}
    return not given & {"hydra.mode=MULTIRUN", *_NO_RUN.split()}


def _refuse(words: list[str], processes: int | None = None) -> None:
    """Raises ValueError for what is mistyped, in one line; a launcher reports it for every process, after seconds."""
    from distopt.job.cli import refuse  # Hydra takes 0.3 s

    refuse(words, processes)


def gpus() -> int:
    """Returns the number of GPUs that this process may use, without importing torch where NVML or nothing says it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    if Path("/dev/kfd").exists():  # ROCm
        import torch

        return torch.cuda.device_count()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    return count.value


def _accelerate(words: list[str]) -> NoReturn:
    if "--help" not in words:
        print(f"distopt: {shlex.join(['accelerate', 'launch', *words])}", file=sys.stderr)
    become(["-m", "accelerate.commands.launch", *words])
