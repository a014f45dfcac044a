"""What is left of a perturbation where weights have, or are computed with in, 16 bits; and how to keep it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from distopt.layout import ShardLayout

# The least that goes without a warning: below them the gradient changes by more than a tenth less or more than it
# should (`python -m benchmarks rounding`).
_SHARE, _COSINE = 0.9, 0.4


def perturb_(weights: list[Tensor], directions: list[Tensor], factors: list[Tensor]) -> None:
    """p <- p + factor * d, in one operation that needs no other memory; bfloat16 weights are rounded by a dither.

        p <- floor(p + factor * d + u)      u from 0 to 1 units of the last place, another one for each element

    Rounded to the nearest, a weight that is bfloat16 already would stay where it was for most of the elements, or move
    by too much: a move of less than a 512th of it is lost. With u the moves are right in the mean. u is a hash of the
    element's p, d and factor: no random numbers are drawn, and it is the same wherever the element lies.
    """
    exact = [i for i, (w, d) in enumerate(zip(weights, directions)) if w.dtype == d.dtype != torch.bfloat16]
    if exact:
        moving, along, by = ([tensors[i] for i in exact] for tensors in (weights, directions, factors))
        torch._foreach_addcmul_(moving, along, by)
    for i in sorted(set(range(len(weights))) - set(exact)):
        w, d, factor = weights[i], directions[i], factors[i]
        moved = torch.addcmul(w.float(), d.float(), factor.float())
        if w.dtype == torch.bfloat16:
            floor = _dither(w, d, factor).add_(moved.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
            moved = torch.where(moved.isfinite(), floor, moved)
        w.copy_(moved)  # float16 weights along float32 state are rounded to the nearest


def _dither(weight: Tensor, direction: Tensor, factor: Tensor) -> Tensor:
    """16 bits for each element. Of the direction its upper half counts: the lower one depends on the order of sums."""
    weights, directions = (t.float().view(torch.int32).bitwise_right_shift(16) & 0xFFFF for t in (weight, direction))
    mixed = weights.mul_(25033) ^ directions.mul_(30011) ^ factor.float().view(torch.int32)  # products below 2^31
    mixed = (mixed.bitwise_right_shift(8) ^ mixed) & 0xFFFF
    return mixed.mul_(27437).bitwise_right_shift_(7).bitwise_and_(0xFFFF)


def warn_of_rounding(
    layout: ShardLayout,
    layers: list[int],
    before: list[Tensor],
    after: list[Tensor],
    moves: Iterable[Tensor],
    dtype: torch.dtype | None,
) -> bool:
    """Warns where the forward pass sees another perturbation than the one that was meant.

        seen = round(p + e) - round(p)
        share = seen . e / |e|^2          what is left along the direction that was meant
        cosine = seen . e / (|seen| |e|)  how much of what is seen is that, and not rounding

    Rounding float32 weights to 16 bits adds noise, which lowers the cosine and leaves the share: the gradient moves as
    it should down to a cosine of 0.4. Every rank has to call it; it does nothing where weights have, and are computed
    with in, 32 bits. Returns whether there was something to measure: a first perturbation may be none, or not finite.
    """
    low = [dtype if dtype is not None and dtype.itemsize < w.element_size() else w.dtype for w in after]
    if all(d.itemsize > 2 for d in low) and (dtype is None or dtype.itemsize > 2):
        return True
    seen = [a.to(d).float() - b.to(d).float() for a, b, d in zip(after, before, low)]
    meant = list(moves)
    total, length = (torch.linalg.vector_norm(n).item() for n in layout.norms(layers, seen, meant))
    (products,) = layout.dots(layers, (seen, meant))
    tiny = torch.finfo(torch.float32).tiny
    share, cosine = (products.sum().item() / max(length * other, tiny) for other in (length, total))
    if not (length > 0 and math.isfinite(cosine)):
        return False
    if share < _SHARE or cosine < _COSINE:
        warnings.warn(
            f"SAM's perturbation is lost in rounding: of rho = {length:.3g} a forward pass sees {share:.0%}, in moves "
            f"of length {total:.3g} at a cosine of {cosine:.2f} to what is meant, because weights are computed with in "
            "16 bits; raise rho, or compute in float32",
            UserWarning,
            stacklevel=5,
        )
    return True
