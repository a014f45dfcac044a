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
