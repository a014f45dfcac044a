"""A language model that an engine trains for a few steps, with and without SAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import distopt
from distopt.engine.train_step import update
from distopt.job.evaluate import validation_loss
from distopt.job.generate import sample
from distopt.models.language_model import LanguageModel
from distopt.optim import LAMB, SGD
from tests.harness.distributed import run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    ENGINES,
    EXPERTS,
    STEPS,
    batch,
    full,
    made,
    mean,
)


def of_two_radii(optimizer: torch.optim.Optimizer, interval: int) -> distopt.SAM:
    """The second param group has a radius of its own."""
    optimizer.param_groups[1]["sam_rho"] = 0.03
    return distopt.SAM(optimizer, rho=0.1, interval=interval)


SAMS: dict[str, Callable[..., distopt.SAM]] = {
    "SAM": partial(distopt.SAM, rho=0.1),
    "SAM every 2": partial(of_two_radii, interval=2),
    "ASAM": partial(distopt.ASAM, rho=1.0),
    "AWP": partial(distopt.AWP, rho=0.05),
    "GSAM": partial(distopt.GSAM, rho=0.1),
    "FriendlySAM": partial(distopt.FriendlySAM, rho=0.1, sigma=0.5),
    "LookSAM": partial(distopt.LookSAM, rho=0.1, interval=2),
    "MomentumSAM": partial(distopt.MomentumSAM, rho=0.1),
    # Where a second moment is small, float32's rounding of it is stretched: eps keeps that within what is tested.
    "PreconditionedSAM": partial(distopt.PreconditionedSAM, rho=0.1, eps=1e-2),
    "FunctionalSAM": partial(distopt.FunctionalSAM, rho=0.1, eps=1e-2),
}


@dataclass(frozen=True)
class Settings:
    """How a model is trained. Of these only `sam`, `optimizer` and `precision` may show in the result."""

    sam: str = ""
    optimizer: str = "SGD"
    precision: str = "fp32"
    micro_batches: int = 1
    validates: bool = False
    engine: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]
    validation: list[float]
    text: list[list[int]]


def train(kind: str, family: str, settings: Settings) -> Trained:
    engine = ENGINES[kind](precision=settings.precision, **settings.engine)
    model = made(LanguageModel(family, (CONFIGS | EXPERTS)[family]), engine)
    if settings.optimizer == "LAMB":
        opt: distopt.ShardedOptimizer = LAMB(distopt.param_groups(model, weight_decay=0.1), lr=0.02)
    else:
        opt = SGD(distopt.param_groups(model, weight_decay=0.1), lr=0.3, momentum=0.9)
    model = engine.attach(model, opt, settings.micro_batches, 1.0)
    stepper = SAMS[settings.sam](opt) if settings.sam else opt
    if settings.sam:
        engine.check_sam(stepper)
    result = Trained([], [], {}, [], [])
    for step in range(STEPS):
        if settings.validates:
            loss = validation_loss(engine, model, [batch(100)], CPU)
            result.validation.append(mean(loss))
            result.text.append(sample(engine, model, [1, 2, 3], 5, seed=step, device=CPU))
        mine = batch(step)
        done = update(engine, model, stepper, mine.chunk(settings.micro_batches), max_grad_norm=1.0)
        assert done.applied
        result.losses.append(mean(done.loss))
        result.norms.append(done.grad_norm)
    engine.unwrap(model)  # weights that are still on their way have come
    result.params = full(model)
    return result


PLAIN = Settings()


@lru_cache
def by_one_process(family: str, sam: str, optimizer: str, validates: bool) -> Trained:
    return run(1, train, "ddp", family, Settings(sam=sam, optimizer=optimizer, validates=validates))[0]
