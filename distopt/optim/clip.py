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
from distopt.optim.observer import observer_of


@eager_island
@torch.no_grad()
def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> Tensor:
    r"""Scales the gradients of an optimizer so that their norm over all parameters and ranks is at most `max_norm`.

        g <- g / max(1, |g| / max_norm)

    One all-reduce per mesh axis that shards, none where every rank has the full model. torch's function of this name
    divides by |g| + 1e-6 instead; the difference is below 1e-6 / |g|. A norm that is inf or NaN makes the gradients NaN
    or zero, as there: skip the step then.

    Args:
        optimizer: Any torch optimizer of the model's own parameters.
        max_norm: >= 0; inf measures and does not clip.

    Returns:
        The global norm before clipping, a 0-D float64 tensor on the layout's device, the same on every rank.

    Raises:
        TypeError: For parameters in the place of the optimizer.
        ValueError: For a max_norm that is negative or no number, and where an engine hides the gradients, and so
            clips on its own (`ShardLayout.gradients_hidden`).
    """
    if not isinstance(max_norm, (Real, Tensor)) or isinstance(max_norm, bool) or not max_norm >= 0.0:
        raise ValueError(f"max_norm must be >= 0, got {max_norm!r}; give inf to measure without clipping")
    grads, total = measure(optimizer)
    clip_(grads, total, max_norm)
    return total


@eager_island
@torch.no_grad()
def measure(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor]:
    """Returns the local gradient shards and their global norm: the first half of `clip_grad_norm_`, at its cost."""
    layout, observer = layout_of(optimizer), observer_of(optimizer)
    if observer is None:
        grads, norms = _grad_norms(optimizer, layout)
    else:
        params, grads = _gradients(optimizer, layout)
        norms = observer.measure(layout, layout.layers(params), grads)
    return grads, exact.norm(norms)  # exact, so the order of the layers does not matter


@torch.no_grad()
def clip_(grads: list[Tensor], total: Tensor, max_norm: float) -> None:
    """Scales gradients of this global norm to at most `max_norm`: the second half of `clip_grad_norm_`."""
    if max_norm != math.inf:
        scale_(grads, torch.where(total <= max_norm, 1.0, max_norm / total))


@eager_island
@torch.no_grad()
def grad_norms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Returns the gradient norm of each full layer, by parameter, to see where a gradient vanishes, explodes or is NaN.

    One all-reduce per mesh axis that shards.

    Returns:
        0-D float64 tensors on the layout's device; 0 for a layer without gradient.

    Raises:
        ValueError: Where an engine hides the gradients.
    """
    layout = layout_of(optimizer)
    _, norms = _grad_norms(optimizer, layout)
    return dict(zip(layout.params, norms))


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies each tensor by a scalar, rounded to its own dtype."""
    for dtype in {t.dtype for t in tensors}:
        torch._foreach_mul_([t for t in tensors if t.dtype == dtype], factor.to(dtype))


def _grad_norms(optimizer: torch.optim.Optimizer, layout: ShardLayout) -> tuple[list[Tensor], Tensor]:
    """Returns the local gradient shards and the norm of each layer over all ranks."""
    params, grads = _gradients(optimizer, layout)
    (norms,) = layout.norms(layout.layers(params), grads)
    return grads, norms


def _gradients(optimizer: torch.optim.Optimizer, layout: ShardLayout) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parameters with a gradient, and the local gradient shards."""
    if layout.gradients_hidden:
        raise ValueError(layout.gradients_hidden)
    params = layouts.with_gradient(p for group in optimizer.param_groups for p in group["params"])
    return params, layout.grads(params)
