"""Submit a training job with submitit, which requeues it at its time limit and after preemption.

python launch/with_submitit.py --nodes 2 --processes 8 --set slurm_partition=gpu name=llama model=llama_1b engine=fsdp2
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit


class Train:
    """The callable that submitit runs on every node: one `accelerate launch`.

    Args:
        processes: The number of processes of each node.
        overrides: The overrides of `distopt.train`.
        port: The port of the first node where the processes meet.
    """

    def __init__(self, processes: int, overrides: list[str], port: int = 29500) -> None:
        self.processes, self.overrides, self.port = processes, overrides, port
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        here = submitit.JobEnvironment()
        machines = ["--config_file", "launch/local.yaml", "--main_process_port", "0"]
        if here.num_nodes > 1:
            machines = ["--config_file", "launch/machines.yaml", "--num_machines", str(here.num_nodes)]
            machines += ["--machine_rank", str(here.node), "--main_process_ip", here.hostnames[0]]
            machines += ["--main_process_port", str(self.port)]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *machines]
        launch += ["--num_processes", str(here.num_nodes * self.processes)]
        # torchrun forwards these to its workers, and gives them time to save.
        handed = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"}
        environment = {**os.environ, **handed, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
        self.process = subprocess.Popen(
            [*launch, "-m", "distopt.train", "train.resume=auto", *self.overrides], env=environment
        )
        code = self._wait()
        if code and here.global_rank:
            time.sleep(60)  # the first node is about to requeue the job, which ends this one
        if code:
            raise RuntimeError(f"the training on node {here.node} ended with exit code {code}: see its log")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the job to requeue, once the training has saved; submitit calls this in its signal handler."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            self._wait()
        return submitit.helpers.DelayedSubmission(Train(self.processes, self.overrides, self.port))

    def _wait(self) -> int:
        """Poll, since a signal handler that interrupts a blocking `wait` cannot wait itself."""
        assert self.process is not None
        while self.process.poll() is None:
            time.sleep(0.1)
        return self.process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="on each node: its GPUs")
    parser.add_argument("--minutes", type=int, default=720, help="the job's time limit")
    parser.add_argument("--folder", type=Path, default=Path("runs/.submitit"), help="submitit's files and the logs")
    parser.add_argument("--cluster", default=None, help="slurm, or local to try it out on this machine")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more parameters of submitit")
    options, overrides = parser.parse_known_args()
    executor = submitit.AutoExecutor(options.folder / "%j", cluster=options.cluster, slurm_max_num_timeout=100)
    executor.update_parameters(
        name="distopt",
        nodes=options.nodes,
        tasks_per_node=1,
        timeout_min=options.minutes,
        **({} if options.cluster == "local" else {"gpus_per_node": options.processes, "slurm_signal_delay_s": 300}),
        **dict(word.split("=", 1) for word in options.set),
    )
    job = executor.submit(Train(options.processes, overrides))
    print(f"job {job.job_id}, log {job.paths.stdout}", flush=True)
    if options.cluster == "local":
        job.result()


if __name__ == "__main__":
    main()
