"""Moments in 8 and 4 bits once more, in float64 and from the table of all codes: what tests compare with.

Nothing here is shared with `distopt`: the format is that of the docstring of `distopt.kernels.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

LOW = 2**32 - 1


def mix(x: int) -> int:
    """M. Overton's and C. Wellons' hash of 32 bits "lowbias32"."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & LOW
    x = ((x ^ x >> 15) * 0x846CA68B) & LOW
    return x ^ x >> 16


def uniform(layer: int, step: int, slot: int, index: int) -> float:
    """The number in [0, 1) of an element of a layer, of 24 bits; slot 0 are the weights, 1 is the first buffer."""
    key = reduce(lambda found, number: mix(found ^ number), (layer, step, slot), 0x9E3779B9)
    return (mix(index & LOW ^ mix(index >> 32 ^ key)) >> 8) / 2**24


def values(kind: str, bits: int) -> Tensor:
    """The magnitudes of all codes, of a block whose scale is 1."""
    if kind == "signed":
        return (torch.arange(2 ** (bits - 1), dtype=torch.float64) / (2 ** (bits - 1) - 1)) ** 2
    return (torch.arange(1, 2**bits + 1, dtype=torch.float64) / 2**bits) ** (2 if bits == 8 else 4)


def rounded(full: Tensor, kind: str, bits: int, block: int, throw: Callable[[int], float]) -> Tensor:
    """What is read of a full tensor that was written: each number is one of the two codes around it."""
    table, found = values(kind, bits), torch.zeros(full.numel(), dtype=torch.float64)
    for first in range(0, full.numel(), block):
        part = full.reshape(-1)[first : first + block].double()
        scale = float(part.abs().max())
        for i, x in enumerate(part.tolist()) if scale > 0.0 else ():
            upper = min(int(torch.searchsorted(table, abs(x) / scale, right=True)), len(table) - 1)
            low, high = float(table[max(upper - 1, 0)]), float(table[upper])
            share = (abs(x) / scale - low) / (high - low) if high > low else 0.0
            magnitude = scale * (high if throw(first + i) < share else low)
            found[first + i] = -magnitude if x < 0.0 else magnitude
    return found.view(full.shape)


def adamw(params: list[Tensor], grads: list[list[Tensor]], bits: int, block: int, **options: float) -> list[Tensor]:
    """The parameters after AdamW's steps with these gradients, all of whose moments are rounded after each."""
    beta1, beta2, eps, decay, lr = (options[name] for name in ("beta1", "beta2", "eps", "weight_decay", "lr"))
    found = []
    for layer, p in enumerate(params):
        x, m, v = p.detach().double(), *torch.zeros(2, *p.shape, dtype=torch.float64)
        for step, grad in enumerate(grads, 1):
            g = grad[layer].double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            x = x - lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * x)
            m = rounded(m, "signed", bits, block, lambda i, s=step, n=layer: uniform(n, s, 1, i))  # type: ignore[misc]
            v = rounded(v, "squares", bits, block, lambda i, s=step, n=layer: uniform(n, s, 2, i))  # type: ignore[misc]
        found.append(x)
    return found
