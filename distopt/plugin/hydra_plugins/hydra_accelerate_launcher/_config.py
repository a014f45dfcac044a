"""The options of `hydra/launcher=accelerate` and `hydra/launcher=accelerate_slurm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class SweepConf:
    """The keys of `hydra.launcher` wherever the jobs run."""

    # Jobs that run at the same time; the GPUs of CUDA_VISIBLE_DEVICES, or all, are distributed over them.
    jobs: int = 1
    # Whether finished jobs of the same configuration in the sweep's folder are skipped, and interrupted ones find
    # HYDRA_LAUNCHER_RESUME=auto in their environment instead of never.
    resume: bool = True

    # Options of `accelerate launch`: its configuration file, and any others, as [--mixed_precision,bf16].
    config_file: str | None = None
    main_process_port: int | None = None  # null: a free one
    args: list[str] = field(default_factory=list)
    # Variables added to the environment of the jobs.
    env: dict[str, str] = field(default_factory=dict)

    # Successive halving: at each of these steps a job is stopped, and returns its metric, unless that is among the best
    # `keep` of those that have come so far. The metric is a key of the rows of metrics.jsonl in the folder of the job.
    rungs: list[int] = field(default_factory=list)
    keep: float = 0.5
    metric: str = "validation_loss"
    greater_is_better: bool = False
    # The time between SIGTERM and SIGKILL, in which a job can save.
    grace_seconds: float = 60.0


@dataclass
class AccelerateLauncherConf(SweepConf):
    """The keys of `hydra.launcher` for jobs on this machine, or in this allocation."""

    _target_: str = "hydra_plugins.hydra_accelerate_launcher.accelerate_launcher.AccelerateLauncher"

    # Without a configuration file: one process per GPU of the job, or one on the CPU.
    num_processes: int | None = None  # over all machines
    num_machines: int = 1
    main_process_ip: str | None = None
    # The words before `accelerate launch`; with several machines the command that starts it on each of them, such as
    # [srun,--ntasks-per-node=1].
    prefix: list[str] = field(default_factory=list)
    # The time limit of a job, after which it has failed; null: none.
    timeout_minutes: float | None = None


@dataclass
class SlurmLauncherConf(SweepConf):
    """The keys of `hydra.launcher` for jobs that are SLURM jobs of their own, named as hydra-submitit-launcher does."""

    _target_: str = "hydra_plugins.hydra_accelerate_launcher.accelerate_launcher.AccelerateSlurmLauncher"

    jobs: int = 64  # in SLURM's queue at the same time
    nodes: int = 1
    gpus_per_node: int | None = None
    # null: one for each GPU, or one.
    processes_per_node: int | None = None
    cpus_per_task: int | None = None  # of the task of a node, which has all its processes
    mem_gb: float | None = None  # of each node
    timeout_min: int = 60
    # The time before this limit at which a job is asked to save, and is then put into the queue again.
    signal_delay_s: int = 120
    requeue: bool = True
    name: str = "${hydra.job.name}"
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    # Any other options of sbatch, without their dashes: {mail-user: me, exclusive: true}.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    # Lines of the shell that run on the first node before the job, as [module load cuda].
    setup: list[str] = field(default_factory=list)
    # The time between two looks at the queue.
    poll_seconds: float = 5.0


_STORE, _PROVIDER = ConfigStore.instance(), "hydra_accelerate_launcher"
_STORE.store(group="hydra/launcher", name="accelerate", node=AccelerateLauncherConf, provider=_PROVIDER)
_STORE.store(group="hydra/launcher", name="accelerate_slurm", node=SlurmLauncherConf, provider=_PROVIDER)
