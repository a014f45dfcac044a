"""A finished run again: its model with a checkpoint's weights, and its training batches, without its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import nn

from distopt import collective
from distopt.checkpoint import load_model
from distopt.checkpoint.folder import newest_checkpoint, open_checkpoint
from distopt.engine import DeepSpeed, Engine
from distopt.job.build import join
from distopt.job.components import Components
from distopt.job.config import CONF
from distopt.job.lengths import micro_batch_size
from distopt.job.text import open_text
from distopt.job.trainee import build_model

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A checkpoint's model on these processes, with the batches of its training.

    Attributes:
        accelerator: The process group and the device.
        engine: Runs the model.
        model: The model, wrapped by the engine, in float32.
        batches: This rank's micro-batches, on its device.
        checkpoint: The folder of the checkpoint.
        folder: The folder of the run.
    """

    accelerator: Accelerator
    engine: Engine
    model: nn.Module
    batches: list[Any]
    checkpoint: Path
    folder: Path


def reopen(path: Path, engine: str | None, batches: int) -> Reopened:
    """Opens a checkpoint of `distopt.train`. Every rank has to call it.

    Args:
        path: The folder of a run, whose newest complete checkpoint it is, or of a checkpoint in one.
        engine: The name of an engine of conf/engine; None for that of the run.
        batches: The number of global training batches, the first ones of the run's order.

    Raises:
        ValueError: If there is no complete checkpoint of a run; for an unknown engine; under DeepSpeed.
    """
    checkpoint = collective.on_first(lambda: newest_checkpoint(path.expanduser()))
    collective.on_first(lambda: open_checkpoint(checkpoint))
    folder = checkpoint.resolve().parents[1]
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} has no config.yaml, so {path} is no run of distopt.train: "
            "give runs/<name>, or a checkpoint in it"
        )
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    if engine is not None:
        file = CONF / "engine" / f"{engine}.yaml"
        if not file.is_file():
            choices = ", ".join(sorted(f.stem for f in file.parent.glob("*.yaml") if "deepspeed" not in f.stem))
            raise ValueError(f"engine {engine!r}: there is no such engine. Choose from {choices}")
        cfg.engine = _composed(engine)
    cfg.engine.precision, cfg.trackers = "fp32", []  # bfloat16's rounding would be larger than the differences
    if "param_dtype" in cfg.engine:
        cfg.engine.param_dtype = None
    parts = Components.of(cfg)
    if isinstance(parts.engine, DeepSpeed):
        raise ValueError("this does not run under DeepSpeed, which owns weights and gradients: add --engine fsdp2")
    accelerator = join(cfg, parts.engine)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    options = cfg.train
    micro_batch = micro_batch_size(options.batch_size, options.micro_batch_size, world)
    text = open_text(cfg, parts.data)
    config = parts.language_model.describe(text.corpus.vocab_size)
    model, _, _ = build_model(parts, config, device, lr=1.0, independent_decay=False)  # for no optimizer
    load_model(checkpoint, parts.engine.unwrap(model))
    own = [text.sequences.batch(step, rank, world).to(device) for step in range(batches)]
    return Reopened(
        accelerator=accelerator,
        engine=parts.engine,
        model=model,
        batches=[part for batch in own for part in batch.split(micro_batch)],
        checkpoint=checkpoint,
        folder=folder,
    )


def _composed(engine: str) -> Any:
    """A choice of the group `engine` with its defaults."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("train", overrides=[f"engine={engine}"]).engine
