"""What is left of a perturbation once weights are rounded to 16 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from distopt.layout import ShardLayout

_RIGHT = 0.9  # the least cosine that goes without a warning


def warn_of_rounding(
    layout: ShardLayout,
    layers: list[int],
    before: list[Tensor],
    after: list[Tensor],
    moves: Iterable[Tensor],
    dtype: torch.dtype | None,
) -> bool:
    """Warns where the forward pass sees another perturbation than the one that was meant.

        seen = round(p + e) - round(p)          cosine = (seen . e) / (|seen| |e|)

    A bfloat16 number has 8 bits: what is less than a 512th of a weight moves it not at all, or by too much. Every rank
    has to call it; it does nothing where weights have, and are computed with in, 32 bits. Returns whether there was
    something to measure: a first perturbation may be none, or not finite.
    """
    low = [dtype if dtype is not None and dtype.itemsize < w.element_size() else w.dtype for w in after]
    if all(d.itemsize > 2 for d in low) and (dtype is None or dtype.itemsize > 2):
        return True
    seen = [a.to(d).float() - b.to(d).float() for a, b, d in zip(after, before, low)]
    meant = list(moves)
    total, length = (torch.linalg.vector_norm(n).item() for n in layout.norms(layers, seen, meant))
    (products,) = layout.dots(layers, (seen, meant))
    cosine = products.sum().item() / max(total * length, torch.finfo(torch.float32).tiny)
    if not (length > 0 and math.isfinite(cosine)):
        return False
    if cosine < _RIGHT:
        warnings.warn(
            f"SAM's perturbation is mostly rounded away: of rho = {length:.3g} the forward pass sees {total:.3g}, at a "
            f"cosine of {cosine:.2f} to what is meant, because weights are computed with in 16 bits; "
            "raise rho, or compute in float32",
            UserWarning,
            stacklevel=5,
        )
    return True
