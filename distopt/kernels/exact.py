"""Sums without rounding: whatever the order, and however many ranks add up, the result is the same bits.

A number is written in `DIGITS` digits of `WIDTH` bits,

    value = sum over i of digit[i] * 2^(WIDTH * i + LOWEST)

each an integer in a float64. Adding them digit by digit is exact up to 2^15 numbers (2^15 ranks, say), as an all-reduce
adds them; what is inf or nan goes into all digits and comes out as it is. The range is that of products of float32,
2^-298 to 2^256, with room for 2^40 of them; of float64 numbers what is below 2^-304 is lost.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

DIGITS, WIDTH, LOWEST = 16, 38, -304  # as in kernels/cpu.c
ADDENDS = 2**15  # that may be added before they are `carried`
_BASE = 2.0**WIDTH


def digits(values: Tensor) -> Tensor:
    """Float64 numbers of shape [...] in digits: [..., DIGITS]."""
    parts = (values.unsqueeze(-1) * _scales(values.device)).floor_()
    found = torch.cat([parts[..., :-1] - _BASE * parts[..., 1:], parts[..., -1:]], -1)
    return torch.where(values.isfinite().unsqueeze(-1), found, values.unsqueeze(-1))


def carried(sums: Tensor) -> Tensor:
    """The one way to write these sums of digits: all digits but the last one from 0 to 2^WIDTH - 1."""
    whole = sums.nan_to_num(0.0, 0.0, 0.0).long()
    for low, high in pairwise(whole.unbind(-1)):
        high += low >> WIDTH
    whole[..., :-1] &= 2**WIDTH - 1
    return torch.where(sums.isfinite(), whole.double(), sums)


def value(sums: Tensor) -> Tensor:
    """The float64 numbers [...] that sums of digits [..., DIGITS] stand for."""
    found, *lower = reversed(carried(sums).unbind(-1))
    for digit in lower:
        found = torch.add(digit, found, alpha=_BASE)
    return found * 2.0**LOWEST


def total(values: Tensor) -> Tensor:
    """The sum of a vector of up to 2^15 float64 numbers, in whatever order they are."""
    return value(digits(values).sum(0))


def norm(values: Tensor) -> Tensor:
    """The 2-norm of a vector of up to 2^15 float64 numbers, in whatever order they are."""
    return total(values.square()).sqrt_()


@functools.lru_cache
def _scales(device: torch.device) -> Tensor:
    # Kept, because making it copies from the host, which waits for the device.
    return torch.tensor([2.0 ** -(WIDTH * i + LOWEST) for i in range(DIGITS)], dtype=torch.float64, device=device)
