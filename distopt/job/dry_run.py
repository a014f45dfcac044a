"""A trial of the components on one small tensor and a model without values, before anything slow starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.cross_entropy import use_chunks
from distopt.health import Monitor
from distopt.job.average import check_average
from distopt.job.config import Config, check_kind, named
from distopt.job.lengths import refuse_epochs
from distopt.optim.mup import check_decoupled, rule_of
from distopt.sam import SAM

if TYPE_CHECKING:
    from distopt.job.components import Components


def dry_run(parts: Components, cfg: Config, steps: int) -> None:
    """Checks that the components fit to each other, the data to the model, and both to the engine.

    Args:
        parts: The components.
        cfg: The configuration.
        steps: The number of steps, or a large one while it is not known.

    Raises:
        ValueError: With the section of the configuration at fault.
    """
    check_updates(parts, steps)
    with named("average"):
        check_average(parts.probe(), parts.make_average, cfg.evaluation.get("average"))
    _check_forward_only(parts, cfg)
    independent_decay = bool(cfg.param_groups.get("independent_decay"))
    _check_init(parts, independent_decay)
    _check_model(parts, independent_decay)
    if cfg.train.epochs is not None and getattr(parts.data, "is_stream", False):
        refuse_epochs(cfg.train.epochs)
    with named("data"):
        parts.data.check()
    parts.language_model.check_tokenizer(getattr(parts.data, "tokenizer", cfg.model.get("path")))


def check_updates(parts: Components, steps: int) -> None:
    """Makes optimizer, schedule and SAM for one small tensor, so that bad arguments are refused before the run.

    Raises:
        ValueError: With the section of the configuration at fault.
    """
    with named("optimizer"):
        optimizer = parts.probe()
        check_kind(optimizer, "optimizer", Optimizer)
    with named("schedule"):
        check_kind(parts.make_schedule(optimizer, total_steps=steps), "schedule", LambdaLR)
    if parts.make_sam:
        with named("sam"):
            sam = parts.make_sam(optimizer)
            check_kind(sam, "sam", SAM)
            parts.engine.check_sam(sam)
    if parts.make_health:
        with named("health"):
            parts.engine.check_health()
            check_kind(parts.make_health(optimizer, nn.Module(), reload=lambda: None), "health", Monitor)


def _check_forward_only(parts: Components, cfg: Config) -> None:
    """Refuses what an optimizer without gradients does not have.

    Raises:
        ValueError: With the key at fault and the remedy.
    """
    if not parts.forward_only:
        return
    with named("optimizer"):
        parts.engine.check_forward_only()
    wrong = {
        "train.max_grad_norm=null": cfg.train.max_grad_norm is not None,
        "sam=off": parts.make_sam is not None,
        "health=off": parts.make_health is not None,
        "train.lr_range_test=null": cfg.train.lr_range_test is not None,
    }
    if missing := [remedy for remedy, needed in wrong.items() if needed]:
        raise ValueError(f"optimizer=mezo has no gradients to clip, to ascend or to watch: give {' '.join(missing)}")


def _check_init(parts: Components, independent_decay: bool) -> None:
    """Checks that the first values would be used, and that the optimizer has the scaling of muP.

    Raises:
        ValueError: With the section of the configuration at fault.
    """
    optimizer = parts.probe()
    if independent_decay:
        with named("param_groups"):
            check_decoupled(optimizer)
    if parts.init is None:
        return
    if parts.language_model.path is not None or parts.adapter:
        raise ValueError(f"init={parts.init.name}: a pretrained model has its weights already; give init=family")
    with named("init"):
        parts.init.check_mup(parts.init.base_width is not None)
        if parts.init.base_width is not None:
            rule_of(optimizer)
            config = parts.language_model.describe(1)
            parts.scaling(config, parts.language_model.empty(config))


def _check_model(parts: Components, independent_decay: bool) -> None:
    """Builds the model on the meta device, with adapter and param groups, which are thus checked before the data.

    Raises:
        ValueError: With the section of the configuration at fault.
    """
    with named("model"):
        model = parts.language_model.check()
    if parts.adapter:
        for key in ("add_tokens", "freeze"):
            if getattr(parts.language_model, key):
                raise ValueError(f"model.{key}: an adapter freezes the whole model, new rows too: give adapter=none")
        with named("adapter"):
            parts.adapter.add(model, parts.language_model.path)
    with named("model"):
        use_chunks(model, tokens=0, needs_logits=parts.needs_logits())
        if parts.language_model.attention == "flash" and not parts.engine.bf16:
            raise ValueError("attention=flash computes in 16 bits only: set engine.precision=bf16, or use sdpa")
    with named("param_groups"):
        parts.groups(model, 1.0, independent_decay, None)
