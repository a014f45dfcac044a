"""Gradient clipping by the global norm, over all ranks."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.kernels import exact
from distopt.layout import ShardLayout, layout_of
from distopt.optim.eager import eager_island


@eager_island
@torch.no_grad()
def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> Tensor:
    r"""Scales the gradients of an optimizer so that their norm over all parameters and ranks is at most `max_norm`.

        g <- g / max(1, |g| / max_norm)

    One all-reduce per mesh axis that shards, none where every rank holds everything. torch's function of this name
    divides by |g| + 1e-6 instead; the difference is below 1e-6 / |g|. A norm that is inf or nan makes the gradients nan
    or zero, as there: skip the step then.

    optimizer: any torch optimizer; it must hold the model's own parameters.
    max_norm: >= 0; inf measures and does not clip.
    Returns the global norm before clipping, a float64 scalar, the same on every rank.
    Raises TypeError for parameters in the optimizer's place, ValueError for a max_norm that is negative or no number,
    and under DeepSpeed, which clips by itself.
    """
    if not isinstance(max_norm, (Real, Tensor)) or isinstance(max_norm, bool) or not max_norm >= 0.0:
        raise ValueError(f"max_norm must be >= 0, got {max_norm!r}; give inf to measure without clipping")
    grads, total = measure(optimizer)
    clip_(grads, total, max_norm)
    return total


@eager_island
@torch.no_grad()
def measure(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor]:
    """The local gradient shards, and their global norm: what `clip_grad_norm_` begins with, at its cost."""
    grads, norms = _grad_norms(optimizer, layout_of(optimizer))
    return grads, exact.norm(norms)  # in whatever order a layout has its layers


@torch.no_grad()
def clip_(grads: list[Tensor], total: Tensor, max_norm: float) -> None:
    """Scales gradients of this global norm to at most `max_norm`: what `clip_grad_norm_` ends with."""
    if max_norm != math.inf:
        scale_(grads, torch.where(total <= max_norm, 1.0, max_norm / total))


@eager_island
@torch.no_grad()
def grad_norms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """The gradient norm of each whole layer, by parameter: where a gradient vanishes, explodes or is nan.

    One all-reduce per mesh axis that shards; 0 for a layer without gradient. Raises ValueError under DeepSpeed.
    """
    layout = layout_of(optimizer)
    _, norms = _grad_norms(optimizer, layout)
    return dict(zip(layout.params, norms))


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies each tensor by a scalar, rounded to its own dtype."""
    for dtype in {t.dtype for t in tensors}:
        torch._foreach_mul_([t for t in tensors if t.dtype == dtype], factor.to(dtype))


def _grad_norms(optimizer: torch.optim.Optimizer, layout: ShardLayout) -> tuple[list[Tensor], Tensor]:
    """The local gradient shards, and the norm of each layer over all ranks."""
    if layout.gradients_hidden:
        raise ValueError(layout.gradients_hidden)
    owners = layouts.with_gradient(p for group in optimizer.param_groups for p in group["params"])
    grads = layout.grads(owners)
    (norms,) = layout.norms(layout.layers(owners), grads)
    return grads, norms
