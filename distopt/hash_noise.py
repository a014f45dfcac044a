"""Normal noise as a pure function of seed, name and element, so that every shard of a tensor draws its own part.

A generator gives numbers in sequence, of which a shard would have to skip those before it; a hash of the index does
not.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64


def noise(seed: int, name: str, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the elements start .. start + numel - 1 of a flat tensor of standard normal values.

        u, v = two uniform values of 32 bits each, of SplitMix64 at element i of the stream (seed, name)
        z[i] = sqrt(-2 ln u) cos(2 pi v)                 Box and Muller's transform

    The same bits for every division of the tensor, and on every device: only operations that IEEE 754 rounds correctly
    are used, in float64. A library's logarithm and cosine are not among them: those here are series, to 1e-14.

    Args:
        seed: An integer.
        name: What tells apart tensors, and steps.
        start: The first element, >= 0.
        numel: The number of elements.
        device: Where to compute.

    Returns:
        float32 tensor of shape [numel].

    References: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014. Box, Muller, 1958.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    x = torch.arange(start + 1, start + numel + 1, dtype=torch.int64, device=device)
    x = x.mul_(_signed(_STEP)).add_(_signed(key))  # int64 wraps around, as the hash's arithmetic does
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shifted(x, shift)).mul_(_signed(factor))
    x = x ^ _shifted(x, 31)
    u = (_shifted(x, 32).double() + 0.5) * 2.0**-32
    v = ((x & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    return (_log(u).mul_(-2.0).sqrt_() * _cos_of_turns(v)).float()


def _log(x: Tensor) -> Tensor:
    """ln of values in (0, 1): x = m 2^e with m in [1/2, 1), and ln m = 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # in [-1/3, 0)
    square, series = s * s, torch.zeros_like(s)
    for k in range(33, 0, -2):
        series = series * square + 2.0 / k
    return series * s + exponent.double() * math.log(2.0)


def _cos_of_turns(v: Tensor) -> Tensor:
    """cos(2 pi v) of values in (0, 1), by the series of -cos at 2 pi (v - 1/2), in [-pi, pi]."""
    x = (v - 0.5) * (2.0 * math.pi)
    square, series = x * x, torch.zeros_like(x)
    for k in range(32, -1, -2):
        series = series * square + (-1.0) ** (k // 2) / math.factorial(k)
    return -series


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills in zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
