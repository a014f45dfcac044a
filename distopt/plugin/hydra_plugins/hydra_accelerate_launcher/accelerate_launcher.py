"""The plugin class, which receives the overrides of every job of a sweep from Hydra."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from . import _command as command
from . import _sweep as sweep
from ._alone import alone
from ._config import AccelerateLauncherConf, SlurmLauncherConf, SweepConf
from ._errors import LauncherError
from ._halving import Halving
from ._job import Job
from ._places import Here, Place
from ._slurm import Slurm, processes_of


class AccelerateLauncher(Launcher):
    """A launcher that runs every job of a sweep under its own `accelerate launch`; this process joins none of them.

    The folder of a job is chosen here, once, and passed to all its processes. If the program, the function below
    `hydra.main`, has an attribute `check`, it is called with the configuration of each job, and the number of processes
    or None, before the first one starts; a ValueError refuses the sweep.

    Args:
        options: The fields of `AccelerateLauncherConf`.
    """

    conf: type[SweepConf] = AccelerateLauncherConf

    def __init__(self, **options: Any) -> None:
        self.options: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self.conf), options))

    def place(self) -> Place:
        """Return where the jobs run."""
        return Here(self.options)

    def processes(self) -> int | None:
        """Return how many processes a job has; None if that depends on the machine."""
        return self.options.num_processes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's context.

        Raises:
            LauncherError: If the options or the environment do not allow a launch.
        """
        self.context, self.config = hydra_context, config
        self.check = getattr(task_function, "check", lambda config, processes: None)
        check(self.options)
        options = self.options
        self.halving = Halving(options.metric, options.rungs, options.keep, options.greater_is_better)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, numbered from `initial_job_idx`, and return their results.

        Raises:
            LauncherError: If there is no job, the program refuses one of the first, two jobs have the same folder, or
                another sweep runs in the folder.
        """
        if not job_overrides:
            raise LauncherError(
                f"the sweep {' '.join(self.config.hydra.overrides.task)} has no jobs, because a range or a choice in "
                "it is empty: give each at least one value, as seed=range(3)"
            )
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / ".launch.lock", "sweep", LauncherError):
            jobs = [self._job(initial_job_idx + i, list(words), folder) for i, words in enumerate(job_overrides)]
            for job in jobs:
                same = next(other for other in jobs if other.folder == job.folder)
                if same is not job:
                    raise LauncherError(
                        f"jobs #{same.number} and #{job.number} have the same folder {job.folder}: "
                        "hydra.sweep.subdir must differ between them, as '${hydra.job.num}' does"
                    )
            if initial_job_idx == 0:  # the later jobs of a search may fail one by one
                self._refuse(jobs)
            return sweep.run(jobs, self.options, self.halving, self.place)

    def _refuse(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                with _current(job.result.hydra_cfg):
                    self.check(job.result.cfg, self.processes())
            except ValueError as error:
                raise LauncherError(f"job #{job.number}, {job.label}: {error}") from None

    def _job(self, number: int, overrides: list[str], sweep_folder: Path) -> Job:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        with _current(config):  # for ${hydra:...} in the name of the folder
            folder = sweep_folder / str(config.hydra.sweep.subdir)
        with read_write(config), read_write(config.hydra.runtime), open_dict(config):
            config.hydra.runtime.output_dir = str(folder)
            result = JobReturn(
                overrides=overrides,
                hydra_cfg=OmegaConf.create({"hydra": config.hydra}),
                working_dir=str(folder),
                task_name=config.hydra.job.name,
            )
            del config["hydra"]
        result.cfg = config
        common: Any = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
        varied = [word for word in overrides if word not in common]
        words = [*command.target(), *command.overrides(self.config, overrides, number, folder)]
        return Job(number, overrides, " ".join(varied or overrides), folder, result, words)


class AccelerateSlurmLauncher(AccelerateLauncher):
    """A launcher that runs every job of a sweep as a SLURM job of its own, of one or several nodes.

    This process waits for them. If it dies, they run on, and the same command waits for them again.

    Args:
        options: The fields of `SlurmLauncherConf`.
    """

    conf = SlurmLauncherConf

    def place(self) -> Place:
        """Return the cluster."""
        return Slurm(self.options)

    def processes(self) -> int:
        """Return how many processes a job has."""
        return processes_of(self.options)


@contextlib.contextmanager
def _current(config: Any) -> Iterator[None]:
    """Make a configuration, in its body, that of `${hydra:...}`."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def check(options: SweepConf) -> None:
    """Check the options of the launcher and its environment.

    Raises:
        LauncherError: If an option is out of bounds or options contradict each other, or if this process was itself
            started by a launcher.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise LauncherError("hydra/launcher=accelerate needs Accelerate: pip install accelerate")
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LauncherError(
            "a sweep with hydra/launcher=accelerate is started by python and starts the processes of its jobs itself; "
            "here every process of an accelerate launch, or of torchrun, would start the sweep"
        )
    for name, low in _LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < low:
            raise LauncherError(f"hydra.launcher.{name} must be >= {low}, got {value}")
    for name in ("timeout_minutes", "poll_seconds", "mem_gb"):
        value = getattr(options, name, None)
        if value is not None and not value > 0:
            raise LauncherError(f"hydra.launcher.{name} must be > 0, got {value}")
    if options.rungs != sorted({rung for rung in options.rungs if rung > 0}):
        raise LauncherError(f"hydra.launcher.rungs must be steps > 0 in increasing order, got {options.rungs}")
    if not 0 < options.keep < 1:
        raise LauncherError(f"hydra.launcher.keep must be > 0 and < 1, got {options.keep}: the share that goes on")
    if options.config_file is not None and not Path(options.config_file).is_file():
        raise LauncherError(f"hydra.launcher.config_file={options.config_file}: no such file")
    if isinstance(options, AccelerateLauncherConf):
        _check_machines(options)
    if isinstance(options, SlurmLauncherConf):
        _check_slurm(options)


_LEAST = {
    **{"jobs": 1, "num_processes": 1, "num_machines": 1, "grace_seconds": 0, "nodes": 1, "gpus_per_node": 0},
    **{"processes_per_node": 1, "cpus_per_task": 1, "timeout_min": 1, "signal_delay_s": 1},
}


def _check_slurm(options: SlurmLauncherConf) -> None:
    if options.requeue and options.signal_delay_s >= 60 * options.timeout_min:
        raise LauncherError(
            f"hydra.launcher.signal_delay_s must be < {60 * options.timeout_min}, the seconds of timeout_min, got "
            f"{options.signal_delay_s}: a job would be asked to save as soon as it starts"
        )
    if options.main_process_port and options.nodes == 1 and options.jobs > 1:
        raise LauncherError("hydra.launcher.main_process_port must be null with jobs > 1: each job takes a free one")
    for name in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise LauncherError(f"hydra.launcher.env: {name!r} is no name of a variable: letters, digits and _")
    for name in options.additional_parameters:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name)):
            raise LauncherError(
                f"hydra.launcher.additional_parameters: {name!r} is no option of sbatch, whose long names have small "
                "letters and hyphens, as mail-user"
            )


def _check_machines(options: AccelerateLauncherConf) -> None:
    if options.prefix and shutil.which(options.prefix[0]) is None:
        raise LauncherError(f"hydra.launcher.prefix: there is no command {options.prefix[0]}")
    if options.num_machines > 1:
        if not options.prefix or options.main_process_ip is None or options.num_processes is None:
            raise LauncherError(
                f"hydra.launcher.num_machines={options.num_machines} needs hydra.launcher.prefix, which starts the job "
                "on each machine (as [srun,--ntasks-per-node=1]), main_process_ip and num_processes"
            )
        if options.num_processes % options.num_machines or options.jobs > 1:
            raise LauncherError(
                f"{options.num_processes} processes on {options.num_machines} machines with jobs={options.jobs}: "
                "every machine gets the same number, and one job at a time"
            )
    if options.main_process_port and options.jobs > 1:
        raise LauncherError("hydra.launcher.main_process_port must be null with jobs > 1: each job takes a free one")
