#!/usr/bin/env python3
"""Stand-ins for the commands of SLURM, by the name under which this file is called: its nodes are this machine.

What they know of a job is a folder in $FAKE_SLURM: `state`, `args`, `script`, and `cancelled` once it was cancelled.
In SLURM sbatch runs the script in a process of its own, srun forwards SIGUSR1 to the nodes, `scancel --signal` sends
a signal to what srun has started, and a job that is requeued starts again with SLURM_RESTART_COUNT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SLURM", "/nonexistent"))
NAMES = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def install(folder: Path) -> str:
    """Make the commands in a folder; return a PATH with them."""
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"#!{sys.executable} -S\n" + Path(__file__).read_text().split("\n", 1)[1])
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def sbatch(words: list[str]) -> None:
    if "--partition=nosuch" in words:
        sys.exit("sbatch: error: invalid partition: nosuch\nsbatch: error: Batch job submission failed: no partition")
    HOME.mkdir(exist_ok=True)
    number = 100 + len(list(HOME.glob("[0-9]*")))
    job = HOME / str(number)
    job.mkdir()
    (job / "args").write_text("\n".join(words))
    (job / "script").write_text(Path(words[-1]).read_text())
    (job / "env").write_text("\n".join(os.environ))
    put(job, "PENDING")
    print(f"{number};cluster" if "--parsable" in words else f"Submitted batch job {number}", flush=True)
    if os.fork() == 0:  # slurmctld, which outlives sbatch
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        control(job, dict(word[2:].partition("=")[::2] for word in words if word.startswith("--")))
        os._exit(0)


def control(job: Path, options: dict[str, str]) -> None:
    """Run a job until it has ended for good."""
    starts = 0
    while True:
        while (HOME / "full").exists() and not (job / "cancelled").exists():
            time.sleep(0.02)
        if (job / "cancelled").exists():
            put(job, "CANCELLED")
            return
        env = {
            **os.environ,
            "SLURM_JOB_ID": job.name,
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_JOB_NODELIST": "node[0-1]",
            "FAKE_STEP": str(job / "step"),
            **({"SLURM_RESTART_COUNT": str(starts)} if starts else {}),
        }
        with open(options["output"].replace("%%", "%"), "a") as out:
            process = subprocess.Popen(
                ["bash", str(job / "script")], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        (job / "batch").write_text(str(process.pid))
        put(job, "RUNNING")
        code = process.wait()
        (job / "step").unlink(missing_ok=True)
        starts += 1
        if (job / "requeue").exists():
            (job / "requeue").unlink()
            put(job, "PENDING")
            continue
        cancelled = (job / "cancelled").exists()
        put(job, "CANCELLED" if cancelled else "COMPLETED" if code == 0 else "FAILED")
        return


def put(job: Path, state: str) -> None:
    """Write a job's state, at once, since squeue may read it."""
    aside = job / "state.tmp"
    aside.write_text(state)
    aside.replace(job / "state")


def squeue(words: list[str]) -> None:
    for job in sorted(HOME.glob("[0-9]*")):
        print(f"{job.name}|{(job / 'state').read_text()}")


def scancel(words: list[str]) -> None:
    with (HOME / "cancels").open("a") as file:
        file.write(" ".join(words) + "\n")
    job = HOME / words[-1]
    named = [word.partition("=")[2] for word in words if word.startswith("--signal=")]
    if named:
        send(job / "step", getattr(signal, f"SIG{named[0]}"))
        return
    (job / "cancelled").touch()
    send(job / "step", signal.SIGKILL)
    send(job / "batch", signal.SIGKILL)


def send(file: Path, number: int) -> None:
    for pid in file.read_text().split() if file.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)


def scontrol(words: list[str]) -> None:
    if words[0] == "show":
        print("127.0.0.1\n127.0.0.1")
    else:
        assert words[0] == "requeue"
        (HOME / words[1] / "requeue").touch()


def srun(words: list[str]) -> None:
    while words[0].startswith("--"):
        words.pop(0)
    nodes: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes])
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        nodes.append(subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(node)}))
    Path(os.environ["FAKE_STEP"]).write_text(" ".join(str(node.pid) for node in nodes))
    sys.exit(max(abs(node.wait()) for node in nodes))


if __name__ == "__main__":
    {name: globals()[name] for name in NAMES}[Path(sys.argv[0]).name](sys.argv[1:])
