"""Sums without rounding: the result is the same bits in every order and at every number of ranks.

A value is written in `DIGITS` digits of `WIDTH` bits,

    value = sum over i of digit[i] * 2^(WIDTH * i + LOWEST)

each an integer in a float64. Adding them digit by digit, as an all-reduce does, is exact for up to 2^15 values (2^15
ranks, say). An inf or NaN goes into all digits, and the sum is inf or NaN. The range is that of products of float32
values, 2^-298 to 2^256, with room for 2^40 of them; the bits of a float64 value below 2^-304 are lost.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

DIGITS, WIDTH, LOWEST = 16, 38, -304  # the same in kernels/cpu.c
ADDENDS = 2**15  # values that may be added before `carried`
_BASE = 2.0**WIDTH


def digits(values: Tensor) -> Tensor:
    """Returns the digits, of shape [..., DIGITS], of float64 values of shape [...]."""
    parts = (values.unsqueeze(-1) * _scales(values.device)).floor_()
    found = torch.cat([parts[..., :-1] - _BASE * parts[..., 1:], parts[..., -1:]], -1)
    return torch.where(values.isfinite().unsqueeze(-1), found, values.unsqueeze(-1))


def carried(sums: Tensor) -> Tensor:
    """Returns the canonical form of sums of digits: all digits but the last one from 0 to 2^WIDTH - 1."""
    whole = sums.nan_to_num(0.0, 0.0, 0.0).long()
    if whole.is_cpu:  # digits that were carried before they were added over ranks take one turn
        held = whole.numpy()
        while (more := held[..., :-1] >> WIDTH).any():
            held[..., :-1] &= 2**WIDTH - 1
            held[..., 1:] += more
    else:  # a GPU is not asked whether there is more
        for low, high in pairwise(whole.unbind(-1)):
            high += low >> WIDTH
        whole[..., :-1] &= 2**WIDTH - 1
    return torch.where(sums.isfinite(), whole.double(), sums)


def value(sums: Tensor) -> Tensor:
    """Returns the float64 values, of shape [...], of sums of digits of shape [..., DIGITS]."""
    found, *lower = reversed(carried(sums).unbind(-1))
    for digit in lower:
        found = torch.add(digit, found, alpha=_BASE)
    return found * 2.0**LOWEST


def total(values: Tensor) -> Tensor:
    """Returns the sum of a vector of up to 2^15 float64 values, the same in every order."""
    return value(digits(values).sum(0))


def norm(values: Tensor) -> Tensor:
    """Returns the 2-norm of a vector of up to 2^15 float64 values, the same in every order."""
    return total(values.square()).sqrt_()


@functools.lru_cache
def _scales(device: torch.device) -> Tensor:
    # Cached, because making it copies from the host, which waits for the device.
    return torch.tensor([2.0 ** -(WIDTH * i + LOWEST) for i in range(DIGITS)], dtype=torch.float64, device=device)
