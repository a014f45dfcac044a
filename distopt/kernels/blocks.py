"""Moments in 8 or 4 bits: the elements of a block share a scale, and each is rounded at random to one of its codes.

A block is 128, 64 or 32 consecutive elements of a row (one index of a parameter's dimension 0), the most that divide
it. What is sharded by rows, or in any other way that cuts no block, has the same codes at every number of ranks. With
the largest magnitude S of a block as its scale, code k stands for

                 signed (first moments)               squares (second moments)
    8 bits       S sign(k) (k / 127)^2    |k| <= 127   S (k / 256)^2    k = 1 ... 256
    4 bits       S sign(k) (k / 7)^2      |k| <= 7     S (k / 16)^4     k = 1 ... 16

Codes are closer where magnitudes are small. Squares have no code for 0, which sqrt(v) in a denominator would turn into
an enormous step: the root of the least is 1/256 of the block's largest. A block whose largest magnitude is below the
smallest normal float32 number is 0; one with an inf or nan is not finite.

A number x between two codes becomes the upper one with the probability (x - lower) / (upper - lower), so that it is
right in the mean and an average that moves by less than a code moves all the same. What is random is the hash of
`distopt.kernels.rounding`. formats.c computes the same bits.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861, whose blocks are
of the local shard, whose codes are from a table, and which rounds to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SIGNED, SQUARES = "signed", "squares"
CODES, SCALE = "_codes", "_scale"  # what is appended to the name of a buffer
_BLOCKS = (128, 64, 32)
_LEAST = 2.0**-126


class Form(NamedTuple):
    """How a state buffer is stored.

    Attributes:
        kind: `SIGNED` or `SQUARES`.
        bits: 16, 8 or 4; 16 are a bfloat16 that is rounded at random.
        block: The elements of a block.
    """

    kind: str
    bits: int
    block: int

    @property
    def top(self) -> int:
        """The largest number that a code stands for."""
        return {(SIGNED, 8): 127, (SIGNED, 4): 7, (SQUARES, 8): 256, (SQUARES, 4): 16}[self.kind, self.bits]

    @property
    def power(self) -> int:
        """The power of a number that is proportional to the value."""
        return 4 if (self.kind, self.bits) == (SQUARES, 4) else 2

    @property
    def nbytes(self) -> float:
        """The bytes of an element, with its share of the scale."""
        return self.bits / 8 + (4 / self.block if self.bits < 16 else 0.0)

    @property
    def per_code(self) -> int:
        """The elements of the parameter in a byte of codes."""
        return 8 // self.bits


def is_of_blocks(name: str) -> bool:
    """Whether a state tensor of this name is the codes or the scales of a buffer."""
    return name.endswith((CODES, SCALE))


def buffer_of(name: str) -> str:
    """Returns the name of the buffer of which a state tensor is all, or the codes, or the scales."""
    return name.removesuffix(CODES).removesuffix(SCALE)


def block_of(shape: Sequence[int]) -> int:
    """Returns the elements of a block of a parameter of this full shape; 0 where its state stays in float32.

    That is so for parameters of fewer than two dimensions, and for those whose rows are no multiple of 32 elements.
    """
    row = math.prod(shape[1:]) if len(shape) > 1 else 0
    return next((block for block in _BLOCKS if row and row % block == 0), 0)


def form_of(kind: str, shape: Sequence[int], codes: Sequence[int]) -> Form:
    """Returns the form of codes of this full shape, of a parameter of this full shape that has blocks."""
    return Form(kind, 8 * math.prod(codes) // max(1, math.prod(shape)), block_of(shape))


def encode(values: Tensor, form: Form, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the codes and the scales of a float32 tensor.

    Args:
        values: Whole blocks, of any shape.
        form: Of 8 or 4 bits.
        noise: 32 random bits for each element, int64 in [0, 2^32); None rounds to the nearest.

    Returns:
        uint8 of shape [elements / per_code], with the first of two elements in the lower half; float32 of shape
        [elements / block].
    """
    x = values.reshape(-1, form.block)
    scale = torch.where(x.abs().amax(1) < _LEAST, 0.0, x.abs().amax(1))
    inverse = torch.where((scale > 0) & scale.isfinite(), 1.0 / scale, 0.0)[:, None]
    magnitude = x.abs() * inverse * float(form.top**form.power)
    root = _sqrt(magnitude) if form.power == 2 else _sqrt(_sqrt(magnitude))
    below = torch.where(root < form.top, root, float(form.top)).floor()  # nan is the largest
    low = below**2 if form.power == 2 else below**2 * below**2
    gap = 2.0 * below + 1.0 if form.power == 2 else ((4.0 * below + 6.0) * below + 4.0) * below + 1.0
    share = 0.5 if noise is None else (noise.reshape(x.shape) >> 8).float() * 2.0**-24
    number = (below + (share * gap < magnitude - low)).clamp_(max=form.top).int()
    code = torch.where(x < 0, -number, number) if form.kind == SIGNED else number.clamp_(min=1) - 1
    code = code.reshape(-1)
    if form.bits == 4:
        code = (code[::2] & 15) | (code[1::2] & 15) << 4
    return (code & 255).to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, form: Form) -> Tensor:
    """Returns the float32 values, flat, of codes and scales."""
    code = codes.reshape(-1).int()
    if form.bits == 4:
        code = torch.stack([code & 15, code >> 4], 1).view(-1)
    if form.kind == SIGNED:
        half = 1 << (form.bits - 1)
        number = ((code ^ half) - half).float()
        power = number * number.abs()
    else:
        number = (code + 1).float()
        power = number**2 if form.power == 2 else number**2 * number**2
    unit = scale.reshape(-1) / float(form.top**form.power)
    return (power.view(-1, form.block) * unit[:, None]).view(-1)


def _sqrt(x: Tensor) -> Tensor:
    """The root, correctly rounded; torch 2.13's own on the CPU is another number by its last bit."""
    return x.double().sqrt().float()
