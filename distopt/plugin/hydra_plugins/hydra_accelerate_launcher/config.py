"""The options of `hydra/launcher=accelerate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore


@dataclass
class AccelerateLauncherConf:
    """The keys of `hydra.launcher`."""

    _target_: str = "hydra_plugins.hydra_accelerate_launcher.accelerate_launcher.AccelerateLauncher"

    # Jobs side by side; the GPUs of CUDA_VISIBLE_DEVICES, or all, are dealt out to them.
    jobs: int = 1
    # Whether what is finished in the sweep's folder, of the same configuration, is not run again, and what was begun
    # finds HYDRA_LAUNCHER_RESUME=auto in its environment instead of never.
    resume: bool = True

    # Options of `accelerate launch`. Without a file: a process for each GPU of the job, or one on the CPU.
    config_file: str | None = None
    num_processes: int | None = None  # over all machines
    num_machines: int = 1
    main_process_ip: str | None = None
    main_process_port: int | None = None  # null: a free one
    args: list[str] = field(default_factory=list)  # any others: [--mixed_precision,bf16]

    # What stands before `accelerate launch`; with several machines what starts it on each: [srun,--ntasks-per-node=1].
    prefix: list[str] = field(default_factory=list)
    # Variables added to the environment of the jobs.
    env: dict[str, str] = field(default_factory=dict)
    # A job that takes longer has failed; null: as long as it likes.
    timeout_minutes: float | None = None
    # What a job that is ended gets to save what it has before SIGKILL.
    grace_seconds: float = 60.0


ConfigStore.instance().store(
    group="hydra/launcher", name="accelerate", node=AccelerateLauncherConf, provider="hydra_accelerate_launcher"
)
