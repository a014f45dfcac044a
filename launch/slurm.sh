#!/usr/bin/env bash
# A training job on SLURM, on any number of nodes, that resumes after its time limit and after preemption:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh name=llama model=llama_1b engine=fsdp2
#
# Submit it from the checkout, in the environment with distopt. The folder runs/ has to be shared by the nodes.
# Five minutes before the time limit SLURM signals this script; the step is finished, a checkpoint is saved, and the
# job is requeued. A preempted job receives SIGTERM and saves as well, and SLURM itself requeues it. --requeue allows both.
#SBATCH --job-name=distopt
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -uo pipefail

nodes=${SLURM_JOB_NUM_NODES:-1}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export LAUNCH="--config_file launch/machines.yaml --num_machines $nodes --num_processes $((nodes * per_node)) \
--main_process_ip $first --main_process_port ${MAIN_PROCESS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# torchrun, under `accelerate launch`, forwards these to its workers and gives them time to save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# shellcheck disable=SC2016  # each node has its own SLURM_PROCID
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
  bash -c 'exec accelerate launch $LAUNCH --machine_rank "$SLURM_PROCID" -m distopt.train train.resume=auto "$@"' \
  node "$@" &
step=$!
asked=
trap 'asked=1; kill -USR1 "$step"' USR1 # srun forwards it to the nodes
trap 'kill -USR1 "$step"' TERM          # preempted or cancelled: SLURM decides about requeueing
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step"
  code=$?
done

if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
