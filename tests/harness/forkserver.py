"""The process from which ranks and jobs are forked, which has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The tests are for the CPU, wherever they run; nothing looks at the network.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'distopt' / 'plugin'}",  # this checkout, whichever is installed
}
# Python has one fork server per process, whose imports are those of whoever starts it: so there is one list for all.
_IMPORTED_ONCE = [
    "accelerate",
    "deepspeed.ops",
    "distopt.data.sft",
    "distopt.data.stream",
    "distopt.data.text_data",
    "distopt.job.build",
    "distopt.job.header",
    "distopt.optim.hidden",
    "distopt.optim.schedules",
    "distopt.plan.running",
    "distopt.train",
    "matplotlib.pyplot",
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "transformers.convert_slow_tokenizer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "torch._inductor.compile_fx",
    "pydantic",
    "setuptools",
    "tests.harness.frozen",
]
context = multiprocessing.get_context("forkserver")


def without_preemption() -> None:
    """Lets a rank, which is this process, run on when another wakes up.

    A thread of gloo (torch 2.13) that finds the lock of a connection taken asks again and again, for the whole of its
    time slice if it has preempted the thread that holds it. Without preemption (SCHED_BATCH) an all-reduce of four
    ranks on one core takes 3 ms in place of 10, and 0.4 ms of CPU time a rank in place of 1.3.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def start() -> None:
    """Starts the fork server, once, without any GPU in sight."""
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        context.set_forkserver_preload(_IMPORTED_ONCE)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)
