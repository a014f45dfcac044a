"""Gradient norms and trust ratios by parameter: where gradients vanish or explode, and where they are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt import collective
from distopt.engine.mezo import MeZO
from distopt.engine.train_step import Update
from distopt.layout import layout_of
from distopt.layout.names import bare_parameters
from distopt.optim.clip import grad_norms
from distopt.sam import SAM

if TYPE_CHECKING:
    from distopt.job.job import Job

_UNKNOWN = "DeepSpeed has freed it, so the parameter is unknown: another engine names it"


@torch.no_grad()
def by_layer(
    model: nn.Module, optimizer: Any, norms: Mapping[Tensor, Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """Returns the gradient norm and the trust ratio of every parameter in the last step, by parameter name.

    Waits for the device: not for every step. Gradients that DeepSpeed has freed are left out, and so are the ratios of
    an optimizer without any and of parameters on other ranks.

    Args:
        model: The unwrapped model.
        optimizer: The optimizer, or SAM around it.
        norms: The gradient norms that the step has measured, by parameter. None measures those of `.grad`, by one
            all-reduce per mesh axis that shards.

    Returns:
        `{"grad_norm": {name: norm}, "trust_ratio": {name: ratio}}`, without what is empty or all 0.
    """
    norms = _norms(optimizer) if norms is None else norms
    ratios = optimizer.trust_ratios() if hasattr(optimizer, "trust_ratios") else {}
    names = {p: name for name, p in bare_parameters(model).items()}
    found = {
        "grad_norm": {names[p]: float(norm) for p, norm in norms.items() if p in names},
        "trust_ratio": {names[p]: float(ratio) for p, ratio in ratios.items() if p in names},
    }
    return {what: values for what, values in found.items() if any(values.values())}


def write_layers(job: Job, done: Update) -> None:
    """Writes each parameter's gradient norm before clipping and its trust ratio, or what the run's health watches.

    Args:
        job: The job.
        done: Its last step.
    """
    if job.health:
        job.health.write()
    else:
        job.monitor.write_layers(by_layer(job.engine.unwrap(job.model), job.stepper, done.grad_norms()))


def nonfinite_gradient_report(model: nn.Module, stepper: torch.optim.Optimizer, step: int, times: int) -> str:
    """Describes which gradients are not finite, and what to do about it; every rank has to call it.

    Args:
        model: The unwrapped model.
        stepper: The optimizer, or SAM around it.
        step: The current step.
        times: The number of steps in a row without a finite gradient.
    """

    def bad(norms: Mapping[Tensor, Tensor]) -> list[str]:
        return [name for name, p in bare_parameters(model).items() if p in norms and not norms[p].isfinite()]

    # With SAM's scope=local, only the rank with the bad gradient knows it.
    ascents = collective.on_all(lambda: bad(stepper.ascent_norms()) if isinstance(stepper, SAM) else [])
    names = next(filter(None, ascents), None) or bad(_norms(stepper))
    where = f"{len(names)} parameters are not finite, the first is {names[0]}. " if names else f"{_UNKNOWN}. "
    what = "gradient"
    if isinstance(stepper, MeZO):
        what, where = "loss", ""
    return (
        f"stopped at step {step}: the {what} was not finite {times} steps in a row; {where}"
        "Lower optimizer.lr or raise schedule.warmup_steps"
    )


def _norms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """The gradient norm of every parameter; empty where gradients have been freed."""
    return grad_norms(optimizer) if layout_of(optimizer).gradients_visible else {}
