"""The components that a configuration names, made and checked before anything slow starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from distopt.engine import Engine
from distopt.job.config import Config, check_kind, instantiate, named
from distopt.models.language_model import LanguageModel
from distopt.models.lora import LoRA
from distopt.optim.base import ShardedOptimizer
from distopt.sam import SAM


@runtime_checkable
class Data(Protocol):
    """The text of a run, such as `TextData`: found by `check`, tokenized by `build`, put in order by the others."""

    def check(self) -> None: ...

    def build(self) -> Any: ...

    def sequences(self, corpus: Any, *, sequence_length: int, batch_size: int, seed: int) -> Any: ...

    def validation_sequences(
        self, corpus: Any, *, sequence_length: int, batch_size: int, max_sequences: int | None
    ) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Components:
    """What a configuration names, made and checked before there is a process group, a data set or a model.

    Attributes:
        engine: Runs the model on several processes.
        language_model: Builds the model.
        data: Finds, tokenizes and orders the text.
        adapter: Adds LoRA's parameters to the model; None for full training.
        make_groups: Model -> param groups.
        make_optimizer: Param groups -> optimizer.
        make_schedule: Optimizer -> schedule.
        make_sam: Optimizer -> SAM around it; None for none.
    """

    engine: Engine
    language_model: LanguageModel
    data: Data
    adapter: LoRA | None
    make_groups: Callable[[nn.Module], list[dict[str, Any]]]
    make_optimizer: Callable[..., ShardedOptimizer]
    make_schedule: Callable[..., LambdaLR]
    make_sam: Callable[[ShardedOptimizer], SAM] | None

    @classmethod
    def of(cls, cfg: Config) -> Components:
        """Instantiates the components; raises ValueError for what one of them refuses."""
        parts = cls(
            engine=instantiate(cfg, "engine", Engine),
            language_model=instantiate(cfg, "model", LanguageModel),
            data=instantiate(cfg, "data", Data),
            adapter=instantiate(cfg, "adapter", object) if cfg.adapter else None,
            make_optimizer=instantiate(cfg, "optimizer"),
            make_schedule=instantiate(cfg, "schedule"),
            make_groups=instantiate(cfg, "param_groups"),
            make_sam=instantiate(cfg, "sam") if cfg.sam else None,
        )
        parts.dry_run(cfg.train.steps)
        parts.check_model()
        with named("data"):
            parts.data.check()
        parts.language_model.check_tokenizer(getattr(parts.data, "tokenizer", cfg.model.get("path")))
        return parts

    def check_model(self) -> None:
        """Builds the model on the meta device, with adapter and param groups: their names are known before any text.

        Raises:
            ValueError: With the section of the configuration at fault.
        """
        with named("model"):
            model = self.language_model.check()
        if self.adapter:
            with named("adapter"):
                self.adapter.add(model, self.language_model.path)
        with named("param_groups"):
            self.make_groups(model)

    def dry_run(self, steps: int) -> None:
        """Makes optimizer, schedule and SAM for one small tensor, so that they refuse their arguments before it starts.

        Raises:
            ValueError: With the section of the configuration at fault.
        """
        with named("optimizer"):
            optimizer = self.make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])
            check_kind(optimizer, "optimizer", Optimizer)
        with named("schedule"):
            check_kind(self.make_schedule(optimizer, total_steps=steps), "schedule", LRScheduler)
        if self.make_sam:
            with named("sam"):
                sam = self.make_sam(optimizer)
                check_kind(sam, "sam", SAM)
                self.engine.check_sam(sam)
