"""Triton kernels that update all tensors of a param group in one launch; each element is read and written once.

A program works on one piece of one tensor. A row of `table` has the addresses of a tensor's weights, gradient and up to
three state buffers, its length and the index of its first piece; a row of `scales` has the values that differ between
tensors, the factor of the direction and that of the gradient. `MODE`:

    STEP     updates state and weights;
    MEASURE  updates the state, and adds up the squares of each piece's weights and of its direction, in the digits of
             `distopt.kernels.exact`; groups of elements, which no shard divides that is a number of rows, are summed
             in float32;
    APPLY    computes the same direction again, from the state, and updates the weights.

So a layer whose full direction has to be known before its first weight changes (LAMB) needs no memory for it. A mode
reads only what it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distopt.kernels import exact
from distopt.kernels.triton_rules import RULES as RULES

STEP, MEASURE, APPLY = range(3)
PIECE = 4096  # elements
WARPS = 8
COLUMNS = 7

_STEP, _MEASURE, _APPLY = tl.constexpr(STEP), tl.constexpr(MEASURE), tl.constexpr(APPLY)
_DIGITS, _WIDTH, _LOWEST = (tl.constexpr(n) for n in (exact.DIGITS, exact.WIDTH, exact.LOWEST))
_NUMEL, _FIRST, _COLUMNS = tl.constexpr(5), tl.constexpr(6), tl.constexpr(COLUMNS)


@triton.jit
def _scale(i):  # type: ignore[no-untyped-def]
    """2^-(WIDTH i + LOWEST)"""
    exponent = i * -_WIDTH + (1023 - _LOWEST)  # as a float64 has it
    return (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _digits(values):  # type: ignore[no-untyped-def]
    """Returns the exact sum of float32 values that are not negative, in digits."""
    finite = values < float("inf")
    i = tl.arange(0, _DIGITS)[None, :]
    wide = tl.where(finite, values, 0.0).to(tl.float64)[:, None]
    above = tl.where(i < _DIGITS - 1, tl.floor(wide * _scale(i + 1)), 0.0)
    digits = tl.floor(wide * _scale(i)) - above * 2.0**_WIDTH
    broken = tl.sum(tl.where(finite, 0.0, values), axis=0).to(tl.float64)
    return tl.sum(digits, axis=0) + broken


@triton.jit
def _at(row, column, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def _load(pointer, index, inside, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    if FULL:
        return tl.load(pointer + index)
    else:
        return tl.load(pointer + index, mask=inside, other=0.0)


@triton.jit
def _store(pointer, index, value, inside, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    if FULL:
        tl.store(pointer + index, value)
    else:
        tl.store(pointer + index, value, mask=inside)


@triton.jit
def _do(  # type: ignore[no-untyped-def]
    row,
    index,
    inside,
    scales,
    squares,
    h,
    RULE: tl.constexpr,
    MODE: tl.constexpr,
    BUFFERS: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    FULL: tl.constexpr,
):
    weights = _at(row, 0, tl.float32, ALIGNMENT)
    first = _at(row, 2, tl.float32, ALIGNMENT)
    second = _at(row, 3, tl.float32, ALIGNMENT)
    third = _at(row, 4, tl.float32, ALIGNMENT)
    p = _load(weights, index, inside, FULL)
    g = _load(_at(row, 1, GRAD, ALIGNMENT), index, inside, FULL).to(tl.float32) * tl.load(scales + 3)
    a, b, c = 0.0, 0.0, 0.0
    if BUFFERS > 0:
        a = _load(first, index, inside, FULL)
    if BUFFERS > 1:
        b = _load(second, index, inside, FULL)
    if BUFFERS > 2:
        c = _load(third, index, inside, FULL)
    s = tl.load(scales), tl.load(scales + 1)
    d, a, b, c = RULE(p, g, a, b, c, s, h, MODE != _APPLY)
    if MODE != _APPLY:
        if BUFFERS > 0:
            _store(first, index, a, inside, FULL)
        if BUFFERS > 1:
            _store(second, index, b, inside, FULL)
        if BUFFERS > 2:
            _store(third, index, c, inside, FULL)
    if MODE == _MEASURE:
        d = tl.where(inside, d, 0.0)  # 0 / 0 beyond the end, where eps is 0
        digit = squares + tl.arange(0, _DIGITS)
        tl.store(digit, _digits(tl.sum(tl.reshape(p * p, (SIZE // GROUP, GROUP)), axis=1)))
        tl.store(digit + _DIGITS, _digits(tl.sum(tl.reshape(d * d, (SIZE // GROUP, GROUP)), axis=1)))
    else:
        _store(weights, index, p - tl.load(scales + 2) * d, inside, FULL)


@triton.jit(do_not_specialize=["tensors"])
def walk(  # type: ignore[no-untyped-def]
    table,
    scales,
    squares,
    tensors,
    h,
    RULE: tl.constexpr,
    MODE: tl.constexpr,
    BUFFERS: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Updates one piece.

    ALIGNMENT is a divisor of all addresses, in bytes; GROUP is the number of elements that are summed in float32.
    """
    piece = tl.program_id(0)
    tensor = 0  # by bisection: the last one whose first piece is not after this one
    end = tensors
    while end - tensor > 1:
        middle = (tensor + end) // 2
        if tl.load(table + middle * _COLUMNS + _FIRST) <= piece:
            tensor = middle
        else:
            end = middle
    row = table + tensor * _COLUMNS
    start = (piece - tl.load(row + _FIRST)) * SIZE
    index = start + tl.arange(0, SIZE)
    inside = index < tl.load(row + _NUMEL)
    scales += 4 * tensor
    squares += 2 * _DIGITS * piece
    # A mask would turn loads of four elements into loads of one, so that only the last piece of a tensor has one.
    if start + SIZE <= tl.load(row + _NUMEL):
        _do(row, index, inside, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, SIZE, GROUP, True)
    else:
        _do(row, index, inside, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, SIZE, GROUP, False)


@triton.jit
def add_up(table, squares, totals, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds up the digits of the pieces of one tensor and column, and their carries to the next digits."""
    tensor = tl.program_id(0)
    column = tl.program_id(1)
    row = table + tensor * _COLUMNS
    first = tl.load(row + _FIRST)
    last = first + tl.cdiv(tl.load(row + _NUMEL), SIZE)
    i = tl.arange(0, _DIGITS)
    sums = tl.zeros([_DIGITS], tl.float64)
    carry = tl.zeros([_DIGITS], tl.float64)
    broken = tl.zeros([_DIGITS], tl.float64)
    for start in range(first, last, BLOCK):
        piece = start + tl.arange(0, BLOCK)[:, None]
        digits = tl.load(squares + (2 * piece + column) * _DIGITS + i[None, :], mask=piece < last, other=0.0)
        finite = digits < float("inf")
        broken += tl.sum(tl.where(finite, 0.0, digits), axis=0)
        sums += tl.sum(tl.where(finite, digits, 0.0), axis=0)
        more = tl.floor(sums * 2.0**-_WIDTH)
        sums -= more * 2.0**_WIDTH
        carry += more
    totals += (2 * tensor + column) * 2 * _DIGITS + i
    tl.store(totals, sums + broken)
    tl.store(totals + _DIGITS, carry)
