"""Random numbers by counting: number i of a sequence is a hash of its key and i, so that every shard computes its own.

    key = blake2b(name)                       64 bits
    x(i) = mix(key + (i + 1) * golden)        the i-th output of SplitMix64 that starts at key

A generator that draws one number after another gives a shard other numbers than the full tensor has there.

Reference: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def key(name: str) -> int:
    """Returns the start of the sequence of this name, a signed 64-bit integer."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def bits(start: int, index: Tensor) -> Tensor:
    """Returns 64 random bits as int64, at these indices (int64) of the sequence that begins at a key."""
    x = (index + 1).mul_(_GOLDEN).add_(start)  # int64 wraps around, as mod 2^64
    for shift, factor in _FACTORS:
        x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
    return x


def uniforms(start: int, index: Tensor) -> Tensor:
    """Returns uniform numbers in (0, 1), float64: (floor(x / 2^12) + 1/2) / 2^52, exactly."""
    return _shifted(bits(start, index), 12).double().add_(0.5).mul_(2.0**-52)


def normals(start: int, index: Tensor) -> Tensor:
    """Returns standard normal numbers, float64, of Box and Muller's transformation.

        u, v = two uniform numbers of 32 bits each, of x(i)
        z(i) = sqrt(-2 ln u) cos(2 pi v)

    The same bits on every device: only operations that IEEE 754 rounds correctly are used. A library's logarithm and
    cosine are not among them; those here are series, to 1e-14.
    """
    x = bits(start, index)
    u = (_shifted(x, 32).double() + 0.5) * 2.0**-32
    v = ((x & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    return _log(u).mul_(-2.0).sqrt_() * _cos_of_turns(v)


def signed(value: int) -> int:
    """Returns the int64 of the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(x: Tensor, by: int) -> Tensor:
    """A shift to the right that fills in zeros; torch's fills in the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


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


_GOLDEN = signed(0x9E3779B97F4A7C15)
_FACTORS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))
