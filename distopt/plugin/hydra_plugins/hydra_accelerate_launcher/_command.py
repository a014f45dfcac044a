"""The command line of a job."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ._config import AccelerateLauncherConf, SlurmLauncherConf
from ._errors import LauncherError

RESULT = "hydra_plugins.hydra_accelerate_launcher._result.Result"
FIRST, PORT = "$first_node", "$port"  # which the script of a SLURM job knows


def target() -> list[str]:
    """Return the running program as arguments of `accelerate launch`: a file, or `-m` and a module."""
    main: Any = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return ["-m", main.__spec__.name]
    file = getattr(main, "__file__", None)
    if file is None or not Path(file).is_file():
        raise LauncherError(
            "hydra/launcher=accelerate starts the program again for every job: run it as a file, or with python -m"
        )
    return [os.path.abspath(file)]


def launch(options: AccelerateLauncherConf, gpus: list[str]) -> list[str]:
    """Return `accelerate launch` with its options, for a job on these GPUs."""
    processes = num_processes(options, gpus)
    if options.num_machines > 1:
        port = str(options.main_process_port or free_port())
        meeting = _meeting(options.num_machines, str(options.main_process_ip), port)
    else:
        meeting = ["--num_machines", "1", "--main_process_port", str(options.main_process_port or 0)]
    return [*options.prefix, *_accelerate(options.config_file, processes), *meeting, *map(str, options.args)]


def launch_on_nodes(options: SlurmLauncherConf, processes: int) -> list[str]:
    """Return `accelerate launch` with its options, as each node of a SLURM job runs it."""
    port = str(options.main_process_port or PORT)
    meeting = ["--num_machines", "1", "--main_process_port", str(options.main_process_port or 0)]
    if options.nodes > 1:
        meeting = _meeting(options.nodes, FIRST, port)
    return [*_accelerate(options.config_file, processes), *meeting, *map(str, options.args)]


def _accelerate(config_file: str | None, processes: int | None) -> list[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    if config_file is not None:
        words += ["--config_file", config_file]
    if processes is not None:
        words += ["--num_processes", str(processes)]
        if processes > 1 and config_file is None:
            words += ["--multi_gpu"]  # otherwise Accelerate 1.15 silently starts one, also on the CPU
    return words


def _meeting(machines: int, address: str, port: str) -> list[str]:
    # The rendezvous assigns the ranks of the machines. With machine_rank 0 Accelerate 1.15 would check on every machine
    # that the port is free.
    words = ["--num_machines", str(machines), "--machine_rank", "1", "--rdzv_backend", "c10d"]
    return [*words, "--main_process_ip", address, "--main_process_port", port]


def num_processes(options: AccelerateLauncherConf, gpus: list[str]) -> int | None:
    """Return the number of processes of a job over all machines; None if Accelerate's configuration file sets it."""
    if options.num_processes is not None:
        return options.num_processes
    if options.config_file is not None and (options.jobs == 1 or not gpus):
        return None
    return max(1, len(gpus))


def overrides(config: DictConfig, job: list[str], number: int, folder: Path) -> list[str]:
    """Return the arguments of the program: the sweep's configuration, the job's overrides, and its folder."""
    words = []
    for source in config.hydra.runtime.config_sources:
        path = source.path if source.schema == "file" else f"{source.schema}://{source.path}"
        if source.provider == "main":
            words += ["--config-path", path]
        elif source.provider == "command-line":
            words += ["--config-dir", path]
    if config.hydra.job.config_name:
        words += ["--config-name", config.hydra.job.config_name]
    sweep = Path(str(config.hydra.sweep.dir)).absolute()
    own = [
        "hydra.mode=RUN",
        f"hydra.run.dir={quoted(folder)}",
        f"hydra.sweep.dir={quoted(sweep)}",
        f"hydra.sweep.subdir={quoted(folder.relative_to(sweep))}",
        f"hydra.job.num={number}",
        f"hydra.job.id={quoted(number)}",
        f"++hydra.callbacks.accelerate_launcher={{_target_: {RESULT}}}",
    ]
    return [*words, *OmegaConf.to_container(config.hydra.overrides.hydra), *job, *own]  # type: ignore[misc]


def quoted(value: object) -> str:
    """Quote a value for Hydra's grammar."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
