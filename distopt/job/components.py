"""The components that a configuration names, made and checked before anything slow starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.batch import LogitsLoss
from distopt.engine import Engine
from distopt.engine.mezo import MeZO
from distopt.health import Monitor
from distopt.init import Initialization, Width, widths
from distopt.init.width import Shapes
from distopt.job.config import Config, instantiate
from distopt.job.dry_run import check_updates, dry_run
from distopt.job.loss import own_loss
from distopt.job.protocols import Data
from distopt.models.language_model import LanguageModel
from distopt.models.lora import LoRA
from distopt.models.meta import base_shapes
from distopt.optim.base import ShardedOptimizer
from distopt.optim.mixed import split_of
from distopt.optim.mup import rule_of
from distopt.optim.weight_average import WeightAverage
from distopt.sam import SAM

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MANY = 10**9  # steps, while it is not known how many epochs make


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components that a configuration names, before there is a process group, a data set or a model.

    Attributes:
        engine: Wraps, steps and saves the model on all ranks.
        language_model: Builds the model.
        data: Finds and tokenizes the text, and orders the batches.
        init: The first values of the weights; None for those of the model family.
        adapter: Adds LoRA's parameters to the model; None for full training.
        make_groups: Sorts the parameters of a model into param groups.
        make_optimizer: Makes the optimizer of param groups.
        make_schedule: Makes the learning-rate schedule of an optimizer.
        make_sam: Wraps an optimizer in SAM; None without SAM.
        loss: What is minimized in place of the cross-entropy; None for that.
        make_health: Makes the health monitor of an optimizer and a model; None without one.
        make_average: Makes the average of an optimizer's weights; None without one.
    """

    engine: Engine
    language_model: LanguageModel
    data: Data
    init: Initialization | None
    adapter: LoRA | None
    make_groups: Callable[[nn.Module], list[dict[str, Any]]]
    make_optimizer: Callable[..., ShardedOptimizer]
    make_schedule: Callable[..., LambdaLR]
    make_sam: Callable[[ShardedOptimizer], SAM] | None
    make_health: Callable[..., Monitor] | None
    make_average: Callable[[ShardedOptimizer], WeightAverage] | None
    loss: LogitsLoss | None = None

    @classmethod
    def of(cls, cfg: Config, engine: Engine | None = None) -> Components:
        """Instantiates and checks the components.

        Args:
            cfg: The configuration.
            engine: The engine, if it is there already.

        Raises:
            ValueError: If one of them refuses its options, with the section of the configuration at fault.
        """
        parts = cls(
            engine=engine or instantiate(cfg, "engine", Engine),
            language_model=instantiate(cfg, "model", LanguageModel),
            data=instantiate(cfg, "data", Data),
            init=instantiate(cfg, "init", Initialization) if cfg.get("init") else None,
            adapter=instantiate(cfg, "adapter", object) if cfg.adapter else None,
            make_optimizer=instantiate(cfg, "optimizer"),
            make_schedule=instantiate(cfg, "schedule"),
            make_groups=instantiate(cfg, "param_groups"),
            make_sam=_scheduled_sam(cfg, cfg.train.steps or _MANY) if cfg.sam else None,
            make_health=instantiate(cfg, "health") if cfg.get("health") else None,
            make_average=instantiate(cfg, "average") if cfg.get("average") else None,
            loss=own_loss(cfg),
        )
        dry_run(parts, cfg, cfg.train.steps or _MANY)
        return parts

    def of_steps(self, cfg: Config) -> Components:
        """Returns the components with an optimizer and a schedule of the number of steps, which is known now.

        Raises:
            ValueError: If one of them refuses it.
        """
        made = {"make_optimizer": instantiate(cfg, "optimizer"), "make_schedule": instantiate(cfg, "schedule")}
        if cfg.sam:
            made["make_sam"] = _scheduled_sam(cfg, cfg.train.steps)
        parts = replace(self, **made)
        check_updates(parts, cfg.train.steps)
        return parts

    def probe(self) -> ShardedOptimizer:
        """Makes the optimizer of one small tensor, to ask it."""
        return self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])

    @property
    def forward_only(self) -> bool:
        """Whether the optimizer takes forward passes alone."""
        return isinstance(self.probe(), MeZO)

    def scaling(self, config: PretrainedConfig, model: nn.Module) -> tuple[Shapes | None, dict[str, Width] | None]:
        """Returns the shapes of muP's base model, and the widths of a model relative to it; None for both without muP.

        Raises:
            ValueError: For a width without a base model, and for a model that muP does not scale.
        """
        if self.init is None or self.init.base_width is None:
            return None, None
        shapes = base_shapes(config, self.init.base_width)
        return shapes, widths(model, shapes)

    def groups(
        self, model: nn.Module, lr: float, independent_decay: bool, shapes: Shapes | None
    ) -> list[dict[str, Any]]:
        """Sorts the parameters of a model into param groups.

        Args:
            model: The model.
            lr: The peak learning rate.
            independent_decay: Whether weight decay is independent of the learning rate.
            shapes: The shapes of muP's base model; None without muP.
        """
        optimizer = self.probe()
        options: dict[str, Any] = split_of(optimizer)
        if shapes is not None:
            options |= {"mup": shapes, "rule": rule_of(optimizer)}
        if shapes is not None or independent_decay:
            options["lr"] = lr
        return self.make_groups(model, **options)

    def needs_logits(self) -> bool:
        """Whether the loss, or SAM's, is computed from the logits."""
        if self.loss is not None:
            return True
        if self.make_sam is None:
            return False
        sam = self.make_sam(self.probe())
        return type(sam).loss is not SAM.loss


def _scheduled_sam(cfg: Config, steps: int) -> Callable[[ShardedOptimizer], SAM]:
    """What makes SAM around an optimizer, with `sam.start` and `sam.stop` as steps where they are fractions."""
    make: Callable[..., SAM] = instantiate(cfg, "sam")
    shares = {name: cfg.sam[name] for name in ("start", "stop") if isinstance(cfg.sam.get(name), float)}
    return functools.partial(make, **{name: round(share * steps) for name, share in shares.items()})
