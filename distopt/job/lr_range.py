"""The learning-rate range test of a training job: `train.lr_range_test=100`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from distopt.engine.train_step import update
from distopt.job.loss import minimized
from distopt.optim.lr_range import LRRange, lr_range_test

if TYPE_CHECKING:
    from distopt.job.job import Job

PICTURE = "lr_range.png"


def run_lr_range_test(job: Job, steps: int, max_grad_norm: float) -> LRRange:
    """Runs the test on the batches that the run trains on next, draws it into the run's folder, and logs its line."""
    rank, world, device = job.accelerator.process_index, job.accelerator.num_processes, job.accelerator.device

    def train_step(i: int) -> float:
        batch = job.sequences.batch(job.step + i, rank, world).to(device)
        parts = batch.split(job.micro_batch)
        done = update(job.engine, job.model, job.optimizer, parts, max_grad_norm, minimized(job.loss))
        return float(job.accelerator.reduce(done.loss, "mean")) if done.applied else math.nan

    job.engine.refresh(job.model)
    try:
        found = lr_range_test(job.engine.unwrap(job.model), job.optimizer, train_step, steps=steps)
    finally:
        job.engine.refresh(job.model)  # full copies of the parameters that were trained
    if job.accelerator.is_main_process:
        draw(found, job.folder / PICTURE)
    job.monitor.say(f"{found} ({job.folder / PICTURE})")
    return found


def draw(found: LRRange, file: Path) -> None:
    """Draws losses, their average and the suggestions over the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.semilogx(found.rates, found.losses, ".", color="0.7", label="loss of a step")
    axis.semilogx(found.rates, found.smoothed, label="smoothed")
    axis.axvline(found.suggested, color="tab:green", label=f"suggested: {found.suggested:.2g}")
    axis.axvline(found.steepest, color="tab:orange", linestyle="--", label=f"steepest: {found.steepest:.2g}")
    axis.set(title="learning-rate range test", xlabel="learning rate", ylabel="loss in nats per token")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)
