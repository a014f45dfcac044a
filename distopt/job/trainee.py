"""What a job trains: the wrapped model, its optimizer with SAM around it, and the schedule."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.token_cache import Corpus
from distopt.job.components import Components
from distopt.job.config import max_grad_norm
from distopt.job.contamination import check_no_cross_contamination
from distopt.models.language_model import blocks
from distopt.optim.averaging import ScheduleFree
from distopt.optim.base import ShardedOptimizer
from distopt.sam import SAM

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig


class Trainee(NamedTuple):
    """A wrapped model with what trains it, and the files that a checkpoint keeps for `distopt.export`."""

    model: nn.Module
    optimizer: ShardedOptimizer
    stepper: ShardedOptimizer | SAM
    schedule: LambdaLR
    files: dict[str, bytes]


def build_trainee(
    cfg: DictConfig,
    parts: Components,
    corpus: Corpus,
    config: PretrainedConfig,
    accelerator: Accelerator,
    micro_batch: int,
    files: dict[str, bytes],
) -> Trainee:
    """Builds the model with its first values, the optimizer, SAM and the schedule.

    Args:
        cfg: The configuration.
        parts: Its components.
        corpus: The tokens, of whose vocabulary the model is.
        config: The configuration of the model.
        accelerator: That of this process.
        micro_batch: The number of sequences of a forward pass of a process.
        files: What a checkpoint keeps of the model and the tokenizer.
    """
    engine, max_norm = parts.engine, max_grad_norm(cfg)
    torch.manual_seed(cfg.seed + accelerator.process_index)
    lr, independent_decay = cfg.optimizer.lr * cfg.lr_scale, bool(cfg.param_groups.get("independent_decay"))
    model, groups, adapter_files = build_model(parts, config, accelerator.device, lr, independent_decay)
    options = {"model": engine.unwrap(model)} if parts.forward_only else {}
    optimizer = parts.make_optimizer(groups, lr=lr, **options)
    schedule = parts.make_schedule(optimizer, total_steps=cfg.train.steps)
    if parts.make_average:
        parts.make_average(optimizer)
    stepper = _stepper(parts, model, optimizer)
    accumulation = cfg.train.batch_size // accelerator.num_processes // micro_batch
    model = engine.attach(model, optimizer, accumulation, max_norm)
    for switch in ("packing", "separate"):
        if getattr(parts.data, switch, False):
            check_no_cross_contamination(engine, model, accelerator.device, corpus.vocab_size, f"data.{switch}")
    return Trainee(model, optimizer, stepper, schedule, files | adapter_files)


def build_model(
    parts: Components, config: PretrainedConfig, device: torch.device, lr: float, independent_decay: bool
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, bytes]]:
    """Builds and wraps the model; returns it with its param groups and the files that describe its adapter."""
    source, engine = parts.language_model, parts.engine
    empty = source.empty(config)
    files = parts.adapter.add(empty, source.path) if parts.adapter else {}
    names = {p: name for name, p in empty.named_parameters()}
    shapes, width = parts.scaling(config, empty)
    fill = None if parts.init is None else functools.partial(parts.init.fill, mup=width)
    # Now: wrapping loses the attributes by which parameters ask for no decay.
    groups = parts.groups(empty, lr, independent_decay, shapes)
    share = engine.share()
    model = engine.build(empty, blocks(empty), lambda unit, where: source.fill(empty, unit, where, fill, share), device)
    params = dict(engine.unwrap(model).named_parameters())
    for group in groups:
        group["params"] = [params[names[p]] for p in group["params"]]
    return model, groups, files


def _stepper(parts: Components, model: nn.Module, optimizer: ShardedOptimizer) -> ShardedOptimizer | SAM:
    """What takes the steps: the optimizer, or SAM around it."""
    if parts.make_sam is None:
        return optimizer
    sam = parts.make_sam(optimizer)
    sam.model = parts.engine.unwrap(model)
    sam.compute_dtype = torch.bfloat16 if parts.engine.bf16 else None
    return sam


def decay_unneeded(trainee: Trainee, steps: int) -> list[str]:
    """A line if the schedule decays for an optimizer that replaces the decay by an average."""
    if not isinstance(trainee.optimizer, ScheduleFree) or trainee.schedule.lr_lambdas[0](steps) >= 1.0:
        return []
    return [f"{type(trainee.optimizer).__name__} needs no decay of the learning rate: schedule=warmup_constant"]
