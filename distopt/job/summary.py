"""The end of a run on the terminal: a sample, the losses, and the commands that go on from there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from distopt.job import run_folder
from distopt.job.about import write_stopped
from distopt.job.curves import draw_curves
from distopt.job.generate import sample
from distopt.job.records import read_metrics
from distopt.models.configuration import positions
from distopt.models.generation import end_tokens

if TYPE_CHECKING:
    from distopt.job.job import Job


def report(job: Job, after: float) -> None:
    """Prints a sample, the losses, and the command that resumes the run; every process has to call it.

    Args:
        job: The job, at its last step.
        after: The validation loss of now, in nats per token.
    """
    cfg, accelerator, terminal = job.cfg, job.accelerator, job.monitor.terminal
    terminal.phase("sampling")
    shown = _sampled(job) if math.isfinite(after) else {}  # nothing can be sampled from logits that are not finite
    if not accelerator.is_main_process:
        return
    if job.callbacks.stopped:
        write_stopped(job)
    terminal.phase("drawing the curves")
    before = next((row["validation_loss"] for row in read_metrics(job.folder) if "validation_loss" in row), after)
    bits = [job.evaluation.bits_per_byte(loss) for loss in (before, after)]
    length = "steps" if cfg.train.epochs is None else "epochs"
    changes = {"train__resume": "auto"}
    stopped = job.callbacks.stopped
    if not stopped:
        changes[f"train__{length}"] = f"{2 * cfg.train[length]}"
    elif cfg.get("early_stopping"):
        changes["early_stopping__patience"] = f"{2 * cfg.early_stopping.patience}"
    resume = run_folder.command(accelerator.num_processes, job.folder, str(cfg.name), **changes)
    rows = {
        **({"stopped early": f"after step {job.step} of {cfg.train.steps}: {stopped}"} if stopped else {}),
        **shown,
        "validation loss": f"{before:.4f} -> {after:.4f} nats per token, {bits[0]:.4f} -> {bits[1]:.4f} bits per byte",
        "curves": str(draw_curves(job.folder)),
        "checkpoint": str(job.checkpoint),
        "resume": resume,
    }
    for name, value in rows.items():
        terminal.say(f"{name + ':':16} {value}")


def _sampled(job: Job) -> dict[str, str]:
    """A prompt and what the model makes of it, by name; nothing if there is no room for a token."""
    evaluation = job.cfg.evaluation
    prompt = job.corpus.encode(evaluation.prompt) or [0]
    length = min(evaluation.sample_tokens, positions(job.config) - len(prompt))
    if length <= 0:
        return {}
    ends = end_tokens(job.corpus.pretrained_tokenizer(), job.config)
    with job.evaluation.weights():
        written = sample(job.engine, job.model, prompt, length, job.cfg.seed, job.accelerator.device, ends)
    answer = written[len(prompt) :]
    ended = answer[-1] in ends
    end = "  [end of text]" if ended else f"  [after {length} tokens]"
    decode = job.corpus.decode
    return {
        "prompt": run_folder.printable(decode(prompt)),
        "sample": run_folder.printable(decode(answer[:-1] if ended else answer)) + end,
    }
