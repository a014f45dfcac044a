"""What each layer is doing: where gradients vanish or explode, how far trust ratios are from 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distopt import collective
from distopt.layout import layout_of
from distopt.layout.names import bare_parameters
from distopt.optim.clip import grad_norms
from distopt.sam import SAM

_UNTOLD = "DeepSpeed, which has freed it, does not tell in which layer: another engine does"


@torch.no_grad()
def by_layer(model: nn.Module, optimizer: Any, clipped: float = 1.0) -> dict[str, dict[str, float]]:
    """`grad_norm` and `trust_ratio` of each layer in the step that was just taken, by its name in the model.

    One all-reduce per mesh axis that shards, and a wait for the device: for now and then. What there is not is left
    out: gradients that DeepSpeed has freed, the ratios of an optimizer without, and of layers that lie on other ranks.

    clipped: what gradients were multiplied by, which the norms are without.
    """
    norms = _norms(optimizer)
    ratios = optimizer.trust_ratios() if hasattr(optimizer, "trust_ratios") else {}
    names = {p: name for name, p in bare_parameters(model).items()}
    found = {
        "grad_norm": {names[p]: float(norm) / clipped for p, norm in norms.items() if p in names},
        "trust_ratio": {names[p]: float(ratio) for p, ratio in ratios.items() if p in names},
    }
    return {what: values for what, values in found.items() if any(values.values())}


def nonfinite_gradient_report(model: nn.Module, stepper: torch.optim.Optimizer, step: int, times: int) -> str:
    """Says which layers' gradients are not finite; asked of all ranks together."""

    def bad(norms: Mapping[Tensor, Tensor]) -> list[str]:
        return [name for name, p in bare_parameters(model).items() if p in norms and not norms[p].isfinite()]

    # With SAM's scope=local only the rank that broke knows it.
    ascents = collective.on_all(lambda: bad(stepper.ascent_norms()) if isinstance(stepper, SAM) else [])
    layers = next(filter(None, ascents), None) or bad(_norms(stepper))
    where = f"{len(layers)} layers are not finite, the first is {layers[0]}. " if layers else f"{_UNTOLD}. "
    return (
        f"stopped at step {step}: the gradient was not finite {times} steps in a row; {where}"
        "Lower optimizer.lr or raise schedule.warmup_steps"
    )


def _norms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """The gradient norm of each layer, none where they have been freed."""
    return grad_norms(optimizer) if layout_of(optimizer).gradients_visible else {}
