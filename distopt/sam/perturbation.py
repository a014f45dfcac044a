"""A perturbation of the weights in progress, and the gradients at the weights before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distopt.layout import ShardLayout
from distopt.sam.backup import Backup


@dataclass
class Perturbation:
    """State between `SAM.perturb` and `SAM.restore`.

    Attributes:
        layout: How the parameters are sharded.
        params: The perturbed parameters.
        backup: Copies of their local shards, and of the buffers of the model.
        unperturbed: Shards of the gradients at the weights, by parameter; None where no member needs them.
    """

    layout: ShardLayout
    params: list[Tensor]
    backup: Backup = field(default_factory=Backup)
    unperturbed: dict[Tensor, list[Tensor]] | None = None


def resolution(params: Sequence[Tensor]) -> float:
    """Returns the smallest angle between gradients that is not their rounding, nor that of sums in float64."""
    return max([3e-8, *(torch.finfo(p.dtype).eps for p in params)])


def rejections(vectors: Sequence[Tensor], along: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Returns v - along * o of each pair, in float32 or wider.

    In 16 bits `along` would be off by 1 in 256, which of a small angle is most, and may be inf.
    """
    wide = [torch.promote_types(v.dtype, torch.float32) for v in vectors]
    return [v.to(w) - along.to(w) * o.to(w) for v, o, w in zip(vectors, others, wide, strict=True)]


def gradient_pairs(
    layout: ShardLayout, params: Sequence[Tensor], unperturbed: dict[Tensor, list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the gradients of the first pass and those of the second, as two lists of shards of the same parameters.

    Args:
        layout: How the parameters are sharded.
        params: Parameters with a gradient in at least one pass. A gradient that the other pass lacks is 0.
        unperturbed: Shards of the gradients of the first pass, by parameter.
    """
    first: list[Tensor] = []
    second: list[Tensor] = []
    for p in params:
        grads = [torch.zeros_like(g) for g in unperturbed[p]] if p.grad is None else layout.grads([p])
        first += unperturbed[p] if p in unperturbed else [torch.zeros_like(g) for g in grads]
        second += grads
    return first, second
