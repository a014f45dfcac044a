"""The block at the start of a run: what trains on what, where, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distopt.data.batch_sizes import BatchSizes
from distopt.job.device import described, unsharded_numel
from distopt.job.run_folder import near
from distopt.version import __version__

if TYPE_CHECKING:
    from distopt.job.job import Job


def header(job: Job, planned_bytes: int | None) -> dict[str, str]:
    """Returns the values of the block by name.

    Args:
        job: The job, before its first step.
        planned_bytes: The planned memory of a process without activations; None if it is not known.
    """
    cfg, engine, corpus, sizes = job.cfg, job.engine, job.corpus, job.corpus.sizes
    memory = "" if planned_bytes is None else f"{_size(planned_bytes)} per process for weights, gradients and state"
    rows = {
        "run": f"{cfg.name}, distopt {__version__}",
        "model": _model(job),
        "data": f"{corpus.source}: {_training_tokens(sizes)}, {sizes['validation']:,} held out",
        "training": _training(job),
        "optimizer": _optimizer(job),
        "devices": described(job.accelerator),
        "engine": f"{type(engine).__name__} in {'bf16' if engine.bf16 else 'fp32'}{', compiled' * engine.compile}",
        "memory": memory,
        "folder": near(job.folder),
    }
    return {name: value for name, value in rows.items() if value}


def _training_tokens(sizes: dict[str, int]) -> str:
    return f"{sizes['train']:,} training tokens" if "train" in sizes else "read while it trains"


def _model(job: Job) -> str:
    params = list(job.engine.unwrap(job.model).parameters())
    every = sum(map(unsharded_numel, params))
    trained = sum(unsharded_numel(p) for p in params if p.requires_grad)
    source = f" from {job.cfg.model.path}" if job.cfg.model.get("path") else ""
    part = "" if trained in (0, every) else f", {trained:,} of them trained"
    return f"{job.config.model_type}{source}, {every:,} parameters{part}"


def _training(job: Job) -> str:
    options, sequences = job.cfg.train, job.sequences
    sizes = sequences.sizes if hasattr(sequences, "sizes") else BatchSizes(options.batch_size)
    largest = max(size for begins, size in sizes.changes if begins < options.steps)
    tokens = options.batch_size * options.sequence_length
    grows = f", growing to {largest}" if largest > options.batch_size else ""
    each = f"{options.batch_size} x {options.sequence_length} = {tokens:,} tokens{grows}"
    total = sizes.before(options.steps)
    epochs = total / sequences.count if sequences.count else None
    passes = options.batch_size // job.accelerator.num_processes // job.micro_batch
    accumulated = f" in {passes} micro-batches" if passes > 1 else ""
    return (
        f"{options.steps:,} steps of {each}{accumulated}: "
        f"{total * options.sequence_length:,} tokens{'' if epochs is None else f', {epochs:.3g} epoch'}"
        f"{'s' * (epochs not in (None, 1))}"
    )


def _optimizer(job: Job) -> str:
    sam = "" if job.stepper is job.optimizer else f"{type(job.stepper).__name__} over "
    rate = f"{job.cfg.optimizer.lr * job.cfg.lr_scale:.4g}"
    return f"{sam}{type(job.optimizer).__name__}, lr {rate}, {job.cfg.schedule._target_.rpartition('.')[2]}"


def _size(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
