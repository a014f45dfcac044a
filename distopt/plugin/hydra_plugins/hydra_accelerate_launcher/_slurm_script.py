"""The script of a SLURM job: the same command on each node, and into the queue again at the time limit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ._command import FIRST, PORT
from ._config import SlurmLauncherConf

# A signal ends `wait`, not the step, and srun forwards it to the nodes. USR1 comes before the time limit; at TERM, of a
# preemption or scancel, SLURM decides about the queue. A job that starts again resumes.
_SCRIPT = """#!/usr/bin/env bash
set -uo pipefail
rm -f {exits}
{env}
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then export HYDRA_LAUNCHER_RESUME=auto; fi
{setup}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
command=({command})
step=
asked=
trap 'asked=1; ${{step:+kill -USR1 $step}}' USR1
trap '${{step:+kill -USR1 $step}}' TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
  "${{command[@]}}" &
step=$!
[ -z "$asked" ] || kill -USR1 "$step"  # it came before there was a step
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
done
wait "$step"  # what it ended with, where a signal ended the wait before
code=$?
if [ -n "$asked" ] && [ "$code" -ne 0 ] && scontrol requeue "$SLURM_JOB_ID"; then
  exit "$code"
fi
echo "$code" >{exits}
exit "$code"
"""


def script(options: SlurmLauncherConf, words: Sequence[str], env: Mapping[str, str], exits: Path) -> str:
    """Return the script of a job. Every word of it is quoted but for the address of the first node and its port.

    Args:
        options: The options of the launcher.
        words: The command that each node runs.
        env: Variables of its environment.
        exits: The file for its exit code, which stays away while the job is in the queue.
    """
    own = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", **env}
    return _SCRIPT.format(
        exits=shlex.quote(str(exits)),
        env="\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in own.items()),
        setup="\n".join(options.setup),
        command=" ".join(f'"{word}"' if word in (FIRST, PORT) else shlex.quote(word) for word in words),
    )
