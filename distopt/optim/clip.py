"""Gradient clipping by the global norm, over all ranks: in place, or as an argument of the step."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.kernels import exact
from distopt.layout import ShardLayout, layout_of, unwrap_optimizer
from distopt.layout.tensors import Trained
from distopt.optim.eager import eager_island
from distopt.optim.observer import observer_of
from distopt.optim.ratios import compares_gradients


class Clip:
    r"""The global norm of an optimizer's gradients, and the factor that scales them to at most `max_norm`.

        factor = 1 / max(1, |g| / max_norm)

        clip = distopt.Clip(optimizer, max_norm=1.0)
        optimizer.step(clip=clip)

    steps as `clip_grad_norm_` and `step` do, with the same bits of float32 weights on the CPU. It does not write the
    gradients: the update multiplies each element as it reads it, which saves 8 bytes per parameter. Gradients of 16
    bits are not rounded again. On a GPU the factor stays on the device, and nothing waits for it.

    Neither weights nor gradients may change between the two. One all-reduce per mesh axis that shards, none where every
    rank has the full model. LARS's trust ratios need no other one: |factor * g| = factor * |g|.

    Args:
        optimizer: Any torch optimizer of the model's own parameters; only `distopt.ShardedOptimizer` and `distopt.SAM`
            have the argument `clip`.
        max_norm: >= 0; inf measures and does not clip.

    Attributes:
        norm: The global norm before clipping, a 0-D float64 tensor on the layout's device, the same on every rank.
        factor: 1.0 with `max_norm=inf`, else a 0-D float64 tensor on that device.
        norms: The norm of each layer before clipping, in the order of the layout; float64 of shape [layers].
        weight_norms: Those of the weights, where the optimizer's trust ratios need them beside these, or None.

    Raises:
        TypeError, ValueError: As `clip_grad_norm_`.
    """

    layout: ShardLayout
    norm: Tensor
    factor: Tensor | float
    norms: Tensor
    weight_norms: Tensor | None
    _optimizer: torch.optim.Optimizer

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> None:
        found = _measured(optimizer, max_norm)
        self.layout, self.norm, self.factor = found.layout, found.norm, found.factor
        self.norms, self.weight_norms = found.norms, found.weight_norms
        self._optimizer = optimizer

    def by_param(self) -> dict[Tensor, Tensor]:
        """Returns the gradient norm of each full layer before clipping, by parameter of the model."""
        return dict(zip(self.layout.params, self.norms))

    def check(self, layout: ShardLayout) -> None:
        """Raises ValueError unless these are the gradients of an optimizer with this layout."""
        if self.layout is not (layout.gradients or layout):
            raise ValueError(
                "the clip measured gradients of another optimizer, or of a layout that is no longer this one's: make "
                "it of the optimizer that steps, after the backward pass: "
                "optimizer.step(clip=distopt.Clip(optimizer, max_norm))"
            )

    @torch.no_grad()
    def scale_(self) -> None:
        """Multiplies the gradients by the factor, in place."""
        if isinstance(self.factor, Tensor):
            scale_(_gradients(self._optimizer, self.layout)[2], self.factor)


@eager_island
@torch.no_grad()
def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> Tensor:
    r"""Scales the gradients of an optimizer so that their norm over all parameters and ranks is at most `max_norm`.

        g <- g / max(1, |g| / max_norm)

    One all-reduce per mesh axis that shards, none where every rank has the full model. torch's function of this name
    divides by |g| + 1e-6 instead; the difference is below 1e-6 / |g|. A norm that is inf or NaN makes the gradients NaN
    or zero, as there: skip the step then. `Clip` has the step multiply, which is faster, and leaves the gradients as
    they are.

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
    found = _measured(optimizer, max_norm)
    if isinstance(found.factor, Tensor):
        scale_(found.grads, found.factor)
    return found.norm


def step_clipped(optimizer: Any, clip: Clip, consumes_grads: bool = False) -> Any:
    """Takes a step by clipped gradients, which are written first only where the optimizer cannot multiply them."""
    if getattr(optimizer, "takes_clip", False):
        return optimizer.step(clip=clip, consumes_grads=consumes_grads)
    clip.scale_()
    return optimizer.step()


def refuse_closure(clip: Clip | None) -> None:
    """Raises ValueError for a clip beside a closure."""
    if clip is not None:
        raise ValueError(
            "step() was given a closure, which computes new gradients, and a clip, which has measured those before: "
            "call distopt.clip_grad_norm_ inside of the closure, or run the passes before distopt.Clip"
        )


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
    layout, params, grads = _gradients(optimizer)
    (norms,) = layout.norms(layout.layers(params), grads)
    return dict(zip(layout.params, norms))


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies each tensor by a scalar, rounded to its own dtype."""
    dtypes = {t.dtype for t in tensors}
    for dtype in dtypes:
        alike = tensors if len(dtypes) == 1 else [t for t in tensors if t.dtype == dtype]
        torch._foreach_mul_(alike, factor.to(dtype))


class _Measured(NamedTuple):
    """What `Clip` knows, and the gradient shards, whose memory it would keep through the next step."""

    layout: ShardLayout
    norms: Tensor
    weight_norms: Tensor | None
    norm: Tensor
    factor: Tensor | float
    grads: list[Tensor]


@eager_island
@torch.no_grad()
def _measured(optimizer: torch.optim.Optimizer, max_norm: float) -> _Measured:
    if not isinstance(max_norm, (Real, Tensor)) or isinstance(max_norm, bool) or not max_norm >= 0.0:
        raise ValueError(f"max_norm must be >= 0, got {max_norm!r}; give inf to measure without clipping")
    layout, params, grads = _gradients(optimizer)
    layers, weight_norms = layout.layers(params), None
    if (observer := observer_of(optimizer)) is not None:
        norms = observer.measure(layout, layers, grads)
    elif (weights := _compared_weights(optimizer, layout, params)) is not None:
        norms, weight_norms = layout.norms(layers, grads, weights)
    else:
        (norms,) = layout.norms(layers, grads)
    norm = exact.norm(norms)  # exact, so the order of the layers does not matter
    factor: Tensor | float = 1.0
    if max_norm != math.inf:
        factor = torch.where(norm <= max_norm, 1.0, max_norm / norm)
    return _Measured(layout, norms, weight_norms, norm, factor, grads)


def _compared_weights(
    optimizer: torch.optim.Optimizer, layout: ShardLayout, params: list[Tensor]
) -> list[Tensor] | None:
    """Returns the local shards of the weights if trust ratios compare their norms with those of the gradients."""
    inner = unwrap_optimizer(optimizer, lambda found: hasattr(found, "ratio_of"))
    if not hasattr(inner, "ratio_of") or not compares_gradients(inner) or inner.layout is not layout:
        return None
    return layout.shards(params, params)


def _gradients(
    optimizer: torch.optim.Optimizer, layout: ShardLayout | None = None
) -> tuple[ShardLayout, list[Tensor], list[Tensor]]:
    """Returns the layout of the gradients, the parameters that have one, and the local gradient shards."""
    trained = Trained.of([p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]])
    layout = layout_of(optimizer, trained.params) if layout is None else layout
    if layout.gradients_hidden:
        raise ValueError(layout.gradients_hidden)
    return layout, trained.stepped, layout.grad_shards(trained.stepped, trained.grads)
