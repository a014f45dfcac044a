"""The components that a configuration names, made and checked before anything slow starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.batch import LogitsLoss
from distopt.data.cross_entropy import use_chunks
from distopt.engine import Engine
from distopt.engine.mezo import MeZO
from distopt.health import Monitor
from distopt.init import Initialization, Width, widths
from distopt.init.width import Shapes
from distopt.job.average import check_average
from distopt.job.config import Config, check_kind, instantiate, named, refuse_epochs
from distopt.job.loss import own_loss
from distopt.job.protocols import Data
from distopt.models.language_model import LanguageModel
from distopt.models.lora import LoRA
from distopt.models.meta import base_shapes
from distopt.optim.base import ShardedOptimizer
from distopt.optim.mixed import split_of
from distopt.optim.mup import check_decoupled, rule_of
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
        parts.dry_run(cfg.train.steps or _MANY)
        with named("average"):
            check_average(parts.probe(), parts.make_average, cfg.evaluation.get("average"))
        parts.check_forward_only(cfg)
        independent_decay = bool(cfg.param_groups.get("independent_decay"))
        parts.check_init(independent_decay)
        parts.check_model(independent_decay)
        if cfg.train.epochs is not None and getattr(parts.data, "is_stream", False):
            refuse_epochs(cfg.train.epochs)
        with named("data"):
            parts.data.check()
        parts.language_model.check_tokenizer(getattr(parts.data, "tokenizer", cfg.model.get("path")))
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
        parts.dry_run(cfg.train.steps)
        return parts

    def probe(self) -> ShardedOptimizer:
        """Makes the optimizer of one small tensor, to ask it."""
        return self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])

    @property
    def forward_only(self) -> bool:
        """Whether the optimizer takes forward passes alone."""
        return isinstance(self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32)]), MeZO)

    def check_forward_only(self, cfg: Config) -> None:
        """Refuses what an optimizer without gradients does not have.

        Raises:
            ValueError: With the key at fault and the remedy.
        """
        if not self.forward_only:
            return
        with named("optimizer"):
            self.engine.check_forward_only()
        wrong = {
            "train.max_grad_norm=null": cfg.train.max_grad_norm is not None,
            "sam=off": self.make_sam is not None,
            "health=off": self.make_health is not None,
            "train.lr_range_test=null": cfg.train.lr_range_test is not None,
        }
        if missing := [remedy for remedy, needed in wrong.items() if needed]:
            raise ValueError(
                f"optimizer=mezo has no gradients to clip, to ascend or to watch: give {' '.join(missing)}"
            )

    def check_init(self, independent_decay: bool) -> None:
        """Checks that the first values would be used, and that the optimizer has the scaling of muP.

        Raises:
            ValueError: With the section of the configuration at fault.
        """
        optimizer = self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])
        if independent_decay:
            with named("param_groups"):
                check_decoupled(optimizer)
        if self.init is None:
            return
        if self.language_model.path is not None or self.adapter:
            raise ValueError(f"init={self.init.name}: a pretrained model has its weights already; give init=family")
        with named("init"):
            self.init.check_mup(self.init.base_width is not None)
            if self.init.base_width is not None:
                rule_of(optimizer)
                config = self.language_model.describe(1)
                self.scaling(config, self.language_model.empty(config))

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
        optimizer = self.make_optimizer([torch.zeros(2, 2, requires_grad=True)])
        options: dict[str, Any] = split_of(optimizer)
        if shapes is not None:
            options |= {"mup": shapes, "rule": rule_of(optimizer)}
        if shapes is not None or independent_decay:
            options["lr"] = lr
        return self.make_groups(model, **options)

    def check_model(self, independent_decay: bool) -> None:
        """Builds the model on the meta device, with adapter and param groups, which are thus checked before the data.

        Raises:
            ValueError: With the section of the configuration at fault.
        """
        with named("model"):
            model = self.language_model.check()
        if self.adapter:
            for key in ("add_tokens", "freeze"):
                if getattr(self.language_model, key):
                    raise ValueError(
                        f"model.{key}: an adapter freezes the whole model, new rows too: give adapter=none"
                    )
            with named("adapter"):
                self.adapter.add(model, self.language_model.path)
        with named("model"):
            use_chunks(model, tokens=0, needs_logits=self.needs_logits())
            if self.language_model.attention == "flash" and not self.engine.bf16:
                raise ValueError("attention=flash computes in 16 bits only: set engine.precision=bf16, or use sdpa")
        with named("param_groups"):
            self.groups(model, 1.0, independent_decay, None)

    def needs_logits(self) -> bool:
        """Whether the loss, or SAM's, is computed from the logits."""
        if self.loss is not None:
            return True
        if self.make_sam is None:
            return False
        sam = self.make_sam(self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)]))
        return type(sam).loss is not SAM.loss

    def dry_run(self, steps: int) -> None:
        """Makes optimizer, schedule and SAM for one small tensor, so that bad arguments are refused before the run.

        Raises:
            ValueError: With the section of the configuration at fault.
        """
        with named("optimizer"):
            optimizer = self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])
            check_kind(optimizer, "optimizer", Optimizer)
        with named("schedule"):
            check_kind(self.make_schedule(optimizer, total_steps=steps), "schedule", LambdaLR)
        if self.make_sam:
            with named("sam"):
                sam = self.make_sam(optimizer)
                check_kind(sam, "sam", SAM)
                self.engine.check_sam(sam)
        if self.make_health:
            with named("health"):
                self.engine.check_health()
                check_kind(self.make_health(optimizer, nn.Module(), reload=lambda: None), "health", Monitor)


def _scheduled_sam(cfg: Config, steps: int) -> Callable[[ShardedOptimizer], SAM]:
    """What makes SAM around an optimizer, with `sam.start` and `sam.stop` as steps where they are fractions."""
    make: Callable[..., SAM] = instantiate(cfg, "sam")
    shares = {name: cfg.sam[name] for name in ("start", "stop") if isinstance(cfg.sam.get(name), float)}
    return functools.partial(make, **{name: round(share * steps) for name, share in shares.items()})
