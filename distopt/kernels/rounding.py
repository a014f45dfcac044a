"""Float32 numbers in bfloat16: rounded at random by an element's place, or with the 16 bits that are cut off.

Rounding to the nearest loses every step below half a unit in the last place, for ever. Two forms lose none:

    at random     x becomes one of its two neighbours, the upper one with the probability (x - lower) / (upper - lower),
                  so that it is right in the mean
    remainder     bfloat16(x), and the lower half of the bits of x: together they are x, bit for bit

What is random is a hash of (key, place of the element in its full layer), and no generator: a number is the same on
every rank, layout and number of ranks, and in formats.c, which computes the same bits.

Reference: Zamirai et al., Revisiting BFloat16 Training, 2020, arXiv 2010.06192, on both. It keeps the error as a number
of bfloat16 (Kahan summation), whose 8 bits do not hold all of it.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

BESIDE = ("master", "remainder")  # what may be in the state beside a 16-bit weight: its value in float32, or the rest
_LOW = 0xFFFFFFFF
_NAN = 0x7FC00000


def key_of(*numbers: int) -> int:
    """Returns a hash of some integers >= 0, of 32 bits: of a layer, its step and a buffer."""
    return reduce(lambda key, number: int(_mix(key ^ (number & _LOW))), numbers, 0x9E3779B9)


def noise(key: int, places: Tensor) -> Tensor:
    """Returns 32 random bits for each place, as int64 in [0, 2^32)."""
    return _mix((places & _LOW) ^ _mix((places >> 32) ^ key))  # type: ignore[return-value]


def at_random(values: Tensor, key: int, places: Tensor) -> Tensor:
    """Returns float32 values in bfloat16, rounded at random; inf and nan stay."""
    bits = _canonical(values) + (noise(key, places) >> 16).to(torch.int32).view(values.shape)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns float32 values in bfloat16, and their remainders: the lower halves of their bits.

    Values halfway between two numbers are rounded away from zero, and not to an even number as torch does: an even
    number with a remainder of one half would stand for two values. All nans become one.

    Returns:
        Two bfloat16 tensors. The second one means nothing as a number; it has this dtype because neither gloo nor NCCL
        (torch 2.13) sends 16-bit integers, which `view(torch.int16)` gives.
    """
    bits = _canonical(values)
    high, low = ((bits + 0x8000) >> 16).to(torch.int16), bits.to(torch.int16)
    return high.view(torch.bfloat16), low.view(torch.bfloat16)


def join(weights: Tensor, remainders: Tensor) -> Tensor:
    """Returns the float32 values that `split` was given.

    A weight that was set to 0 since is 0. Another one that was changed since has the remainder of before, which is
    less than the rounding of bfloat16.
    """
    high, low = weights.view(torch.int16).to(torch.int32), _low(remainders)
    bits = (high - (low >> 15)) << 16 | low
    return torch.where((high & 0x7FFF == 0) & (low >> 15 > 0), high << 16, bits).view(torch.float32)


def remainders_of(weights: Tensor, values: Tensor) -> Tensor:
    """Returns remainders by which weights stand for float32 values, of which they are the roundings to the nearest.

    Weights that are not have a remainder of 0. A value that torch has rounded to an even number, where `split` takes
    the other one, moves by its last bit.
    """
    high, low = split(values)
    tie = (values.to(torch.bfloat16) == weights) & (high != weights)
    bits = torch.where(tie, 0x7FFF, torch.where(high == weights, _low(low), 0))
    return bits.to(torch.int16).view(torch.bfloat16)


def masters_of(weights: Tensor, remainders: Tensor) -> Tensor:
    """Returns float32 values that torch rounds to these weights: those of `join`, but for ties."""
    values = join(weights, remainders)
    moved = (values.view(torch.int32) + 1).view(torch.float32)
    return torch.where((values.to(torch.bfloat16) == weights) | values.isnan(), values, moved)


def _low(remainders: Tensor) -> Tensor:
    """Returns remainders as integers in [0, 2^16)."""
    return remainders.view(torch.int16).to(torch.int32) & 0xFFFF


def _canonical(values: Tensor) -> Tensor:
    """Returns the bits of float32 values, those of one nan for all: a carry would make a number of others."""
    return torch.where(values.isnan(), _NAN, values.contiguous().view(torch.int32))


def _mix(x: int | Tensor) -> int | Tensor:
    """Returns a permutation of the integers of 32 bits in which each bit depends on all."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)
