"""Saving a job, with what its checkpoints tell of the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.job.checkpointer import all_finite
from distopt.job.text import bookmarks
from distopt.optim.averaging import eval_mode

if TYPE_CHECKING:
    from distopt.job.job import Job


def save(job: Job) -> None:
    """Saves a checkpoint of the current step, or starts to in the background, if a run can be resumed from it.

    One without finite weights would be the newest, and the good ones before it would be pruned for it. Every rank has
    to call it.
    """
    model = job.engine.unwrap(job.model)
    if job.monitor.skipped_in_a_row or not math.isfinite(job.evaluation.loss) or not all_finite(model):
        job.monitor.say(f"step {job.step}: no checkpoint, since the run has diverged; {way_back(job)}")
        return
    # Schedule-free: a checkpoint has the average as its weights, and a resumed run takes the same way back.
    eval_mode(job.stepper)
    tell = job.monitor.begin("saving a checkpoint")
    job.checkpoint = job.checkpointer.save(job.step, model, job.stepper, job.schedule, extra(job), job.files)
    tell(f"checkpoint {job.checkpoint.name}")


def written(job: Job, path: Path) -> None:
    """Calls the callbacks when a checkpoint is on the disk; every rank has to call it.

    Args:
        job: The job.
        path: The folder of the checkpoint.
    """
    job.checkpoint = path
    if added := job.callbacks.call("after_checkpoint", job, job.evaluation.metrics):
        job.monitor.write(added)


def extra(job: Job) -> dict[str, Any]:
    """Returns what the manifest of a checkpoint keeps beside the tensors: what the run is, and where it stands."""
    kept = {"step": job.step, "chat": job.corpus.chat, **job.monitor.totals.row(), **job.identity}
    if job.evaluation.step == job.step:  # between two evaluations, after a signal, there is no loss of this step
        kept["validation_loss"] = job.evaluation.loss
    if marks := bookmarks(job.sequences, job.step + job.passed_over):
        kept |= {"stream": marks}
    if job.health:
        kept |= {"passed_over": job.passed_over, "health": job.health.monitor.state_dict()}
    if job.noise:
        kept |= {"noise_scale": job.noise.scale.state_dict()}
    if states := job.callbacks.state_dict():
        kept |= {"callbacks": states}
    return kept


def way_back(job: Job) -> str:
    """Says how a run that has diverged goes on."""
    if job.checkpoint is None:
        return "it has no checkpoint to resume from: start it with a lower optimizer.lr"
    return f"train.resume=auto resumes from {job.checkpoint}, with a lower optimizer.lr for example"
