"""The options of `hydra/launcher=accelerate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore


@dataclass
class AccelerateLauncherConf:
    """The keys of `hydra.launcher`."""

    _target_: str = "hydra_plugins.hydra_accelerate_launcher.accelerate_launcher.AccelerateLauncher"

    # Jobs that run at the same time; the GPUs of CUDA_VISIBLE_DEVICES, or all, are distributed over them.
    jobs: int = 1
    # Whether finished jobs of the same configuration in the sweep's folder are skipped, and interrupted ones find
    # HYDRA_LAUNCHER_RESUME=auto in their environment instead of never.
    resume: bool = True

    # Options of `accelerate launch`. Without a file: one process per GPU of the job, or one on the CPU.
    config_file: str | None = None
    num_processes: int | None = None  # over all machines
    num_machines: int = 1
    main_process_ip: str | None = None
    main_process_port: int | None = None  # null: a free one
    args: list[str] = field(default_factory=list)  # any others: [--mixed_precision,bf16]

    # The words before `accelerate launch`; with several machines the command that starts it on each of them, such as
    # [srun,--ntasks-per-node=1].
    prefix: list[str] = field(default_factory=list)
    # Variables added to the environment of the jobs.
    env: dict[str, str] = field(default_factory=dict)
    # The time limit of a job, after which it has failed; null: none.
    timeout_minutes: float | None = None
    # Successive halving: at each of these steps a job is stopped, and returns its metric, unless that is among the best
    # `keep` of those that have come so far. The metric is a key of the rows of metrics.jsonl in the folder of the job.
    rungs: list[int] = field(default_factory=list)
    keep: float = 0.5
    metric: str = "validation_loss"
    greater_is_better: bool = False
    # The time between SIGTERM and SIGKILL, in which a job can save.
    grace_seconds: float = 60.0


ConfigStore.instance().store(
    group="hydra/launcher", name="accelerate", node=AccelerateLauncherConf, provider="hydra_accelerate_launcher"
)
