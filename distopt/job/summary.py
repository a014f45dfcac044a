"""The end of a run on the terminal: a sample, the losses, and the command that resumes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from distopt.job import run_folder
from distopt.job.evaluate import sample
from distopt.job.metrics import plot
from distopt.models.language_model import positions

if TYPE_CHECKING:
    from distopt.job.job import Job


def report(job: Job, before: float, after: float) -> None:
    """Prints a sample, the losses, and the command that resumes the run; every process has to call it.

    Args:
        job: The job, at its last step.
        before: The validation loss at its start, in nats per token.
        after: That of now.
    """
    cfg, accelerator = job.cfg, job.accelerator
    prompt = job.corpus.encode(cfg.evaluation.prompt) or [0]
    length = min(cfg.evaluation.sample_tokens, positions(job.config) - len(prompt))
    written = prompt
    if length > 0 and math.isfinite(after):  # nothing can be sampled from logits that are not finite
        written = sample(job.engine, job.model, prompt, length, cfg.seed, accelerator.device)
    if not accelerator.is_main_process:
        return
    changes = {"train__resume": "auto", "train__steps": str(2 * cfg.train.steps)}
    changes |= run_folder.elsewhere(job.folder, str(cfg.name))
    resume = run_folder.command(HydraConfig.get().overrides.task, accelerator.num_processes, **changes)
    bits = [job.bits_per_byte(loss) for loss in (before, after)]
    print(f"\nsample: {run_folder.printable(job.corpus.decode(written))}\n")
    print(f"validation loss: {before:.4f} -> {after:.4f} nats per token, {bits[0]:.4f} -> {bits[1]:.4f} bits per byte")
    print(f"curves:          {plot(job.folder)}")
    print(f"checkpoint:      {job.checkpoint}")
    print(f"resume:          {resume}")
