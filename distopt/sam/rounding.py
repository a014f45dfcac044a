"""Rounding of a perturbation where the weights or the compute dtype have 16 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from distopt.layout import ShardLayout

# The bounds of the warning: below them the gradient's change is off by more than a tenth
# (`python -m benchmarks rounding`).
_SHARE, _COSINE = 0.9, 0.4


def perturb_(weights: list[Tensor], directions: list[Tensor], factors: list[Tensor]) -> None:
    """Adds factor * d to p in place, without scratch memory; bfloat16 weights are rounded by a dither.

        p <- floor(p + factor * d + u)      u from 0 to 1 units in the last place, one per element

    With rounding to nearest, most elements of a bfloat16 weight would not change, or change too much: a change of less
    than a 512th of the element is lost. With u the changes are right in the mean. u is a hash of the element's p, d and
    factor: no random numbers are drawn, and it does not depend on how the parameter is sharded.
    """
    if {t.dtype for t in weights} | {t.dtype for t in directions} == {torch.float32}:
        once = {key: factor.float() for key, factor in {id(factor): factor for factor in factors}.items()}
        torch._foreach_addcmul_(weights, directions, [once[id(factor)] for factor in factors])
        return
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
    """Returns 16 bits per element. Ignores the direction's lower half, which depends on the order of summation."""
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
    """Warns if the forward pass sees a perturbation other than the intended one. Collective.

        seen = round(p + e) - round(p)
        share = seen . e / |e|^2          what is left along the intended direction
        cosine = seen . e / (|seen| |e|)  how much of what is seen is intended, and not rounding

    Rounding float32 weights to 16 bits adds noise, which lowers the cosine and leaves the share: the gradient changes
    as it should down to a cosine of 0.4. Does nothing where the weights and the compute dtype have 32 bits.

    Args:
        layout: How the parameters are sharded.
        layers: The indices of the layers of the shards.
        before: Shards of the weights p.
        after: Shards of the perturbed weights.
        moves: Shards of the intended perturbation e.
        dtype: The compute dtype, or None for that of the weights.

    Returns:
        Whether the check is done: the first perturbation may be zero or not finite, and then measures nothing.
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
