"""Random numbers by counting: element i of a parameter is a hash of (seed, name, i), on whichever rank it is.

    key = blake2b(seed/name)                  64 bits
    x(i) = mix(key + (i + 1) * golden)        the i-th output of SplitMix64 that starts at key
    u(i) = (floor(x / 2^12) + 1/2) / 2^52     uniform in (0, 1), exact in float64

A generator that draws one number after another gives a shard other numbers than the full tensor has there.

Reference: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distopt.proof.content import Box, Place, Run, signed, size

_GOLDEN = signed(0x9E3779B97F4A7C15)
_FACTORS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))
_CHUNK = 2**20  # elements at once, which take some 40 MB of scratch memory

# The bounds of a truncated normal, in standard deviations of the normal that is cut, and the deviation that is left.
CUT = 2.0
_BELOW = 0.5 * math.erfc(CUT / math.sqrt(2.0))
_KEPT = math.sqrt(1.0 - 2.0 * CUT * math.exp(-0.5 * CUT * CUT) / math.sqrt(2.0 * math.pi) / (1.0 - 2.0 * _BELOW))


def key(seed: int, name: str) -> int:
    """Returns the start of a parameter's sequence, a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(start: int, index: Tensor) -> Tensor:
    """Returns the uniform numbers in (0, 1), float64, at these indices of the sequence that begins at a key."""
    x = (index + 1).mul_(_GOLDEN).add_(start)  # int64 wraps around, as mod 2^64
    for shift, factor in _FACTORS:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return (x >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)


def standardized(distribution: str, u: Tensor) -> Tensor:
    """Returns numbers of mean 0 and variance 1 by the distribution's quantile function of uniform numbers.

    uniform             sqrt(3) * (2 u - 1)
    normal              z(u)                                   z: the quantile function of the normal
    truncated_normal    z(b + (1 - 2 b) u) / 0.8796...         b = P(Z < -2), 0.8796... its standard deviation
    """
    if distribution == "uniform":
        return u.mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0))
    if distribution == "normal":
        return torch.special.ndtri(u)
    return torch.special.ndtri(u.mul_(1.0 - 2.0 * _BELOW).add_(_BELOW)).div_(_KEPT)


def indices(place: Place, shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yields the indices in the flattened parameter of the elements at a place, in chunks.

    Args:
        place: The elements that a local tensor has.
        shape: The full shape of the parameter.
        device: The device of the indices.

    Yields:
        The first element of the chunk in the flattened local tensor, and the indices, int64.
    """
    for start in range(0, total := size(place), _CHUNK):
        rest = torch.arange(start, min(start + _CHUNK, total), device=device)
        yield start, rest + place.start if isinstance(place, Run) else _of_box(place, shape, rest)


def _of_box(box: Box, shape: Sequence[int], rest: Tensor) -> Tensor:
    """Returns the indices in the full parameter of elements of a box, given by their place in the box."""
    index, stride = torch.zeros_like(rest), 1
    for own, full in zip(reversed(box.indices), reversed(shape)):
        at = rest % len(own)
        index += stride * (at + own.start if isinstance(own, range) else own.to(rest.device)[at])
        rest, stride = rest // len(own), stride * full
    return index
