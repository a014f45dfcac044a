"""What each layer is doing: where gradients vanish or explode, how far trust ratios are from 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distopt.clip import grad_norms


@torch.no_grad()
def by_layer(model: nn.Module, optimizer: Any, clipped: float = 1.0) -> dict[str, dict[str, float]]:
    """`grad_norm` and `trust_ratio` of each layer in the step that was just taken, by its name in the model.

    One all-reduce per mesh axis that shards, and a wait for the device: for now and then. What there is not is left
    out: gradients that DeepSpeed has freed, the ratios of an optimizer without, and of layers that lie on other ranks.

    clipped: what gradients were multiplied by, which the norms are without.
    """
    norms = grad_norms(optimizer)
    ratios = optimizer.trust_ratios() if hasattr(optimizer, "trust_ratios") else {}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found = {
        "grad_norm": {names[p]: float(norm) / clipped for p, norm in norms.items() if p in names},
        "trust_ratio": {names[p]: float(ratio) for p, ratio in ratios.items() if p in names},
    }
    return {what: values for what, values in found.items() if any(values.values())}
