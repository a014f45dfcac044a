"""The rules of distopt/optim in Triton: each number is read and written once, whatever the number of tensors.

A program works on one piece of one tensor. A row of `table` holds the addresses of a tensor's weights, gradient and up
to three state buffers, its length and the number of its first piece; a row of `scales` what differs between tensors,
the last of them what the direction is multiplied by. `MODE`:

    STEP     moves state and weights;
    MEASURE  moves the state, and adds up the squares of each piece's weights and of its direction, in the digits of
             `distopt.kernels.exact`: those of groups of elements, which no shard cuts that is a number of rows, in
             float32;
    APPLY    makes the same direction again, from the state, and moves the weights.

So a layer whose direction has to be known whole before it may move (LAMB) needs no memory for it. What a mode does not
need, it does not read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from distopt.kernels import exact

STEP, MEASURE, APPLY = range(3)
PIECE = 4096  # elements
WARPS = 8
COLUMNS = 7

_STEP, _MEASURE, _APPLY = tl.constexpr(STEP), tl.constexpr(MEASURE), tl.constexpr(APPLY)
_DIGITS, _WIDTH, _LOWEST = (tl.constexpr(n) for n in (exact.DIGITS, exact.WIDTH, exact.LOWEST))
_NUMEL, _FIRST, _COLUMNS = tl.constexpr(5), tl.constexpr(6), tl.constexpr(COLUMNS)


# A rule takes weights, gradient, its state a, b, c, the tensor's scales s and the group's scalars h, both in the order
# of distopt/kernels/rules.py and with its names. It returns the direction and the state; unless MOVES, that of a state
# which has moved already.


@triton.jit
def sgd(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    (weight_decay,) = h
    ratio, _ = s
    return ratio * (g + weight_decay * p), a, b, c


@triton.jit
def momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, momentum = h
    ratio, one_minus_dampening = s
    if MOVES:
        a = momentum * a + one_minus_dampening * (ratio * (g + weight_decay * p))
    return a, a, b, c


@triton.jit
def nesterov(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, momentum = h
    ratio, one_minus_dampening = s
    g = ratio * (g + weight_decay * p)
    if MOVES:
        a = momentum * a + one_minus_dampening * g
    return g + momentum * a, a, b, c


@triton.jit
def adagrad(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, eps = h
    inverse_rate_decay, _ = s
    g += weight_decay * p
    if MOVES:
        a += g * g
    return tl.div_rn(g * inverse_rate_decay, tl.sqrt_rn(a) + eps), a, b, c


@triton.jit
def rmsprop(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """a = square_avg"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    g += weight_decay * p
    if MOVES:
        a = alpha * a + one_minus_alpha * (g * g)
    return tl.div_rn(g, tl.sqrt_rn(a) + eps), a, b, c


@triton.jit
def rmsprop_centered(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = grad_avg"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    g += weight_decay * p
    if MOVES:
        a = alpha * a + one_minus_alpha * (g * g)
        b = _lerp(b, g, one_minus_alpha, alpha)
    variance = a - b * b
    variance = tl.where(variance < 0.0, 0.0, variance)  # nan stays nan
    return tl.div_rn(g, tl.sqrt_rn(variance) + eps), a, b, c


@triton.jit
def rmsprop_momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = momentum_buffer"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    if MOVES:
        d, a, _, _ = rmsprop(p, g, a, b, c, s, h, MOVES)
        b = momentum * b + d
    return b, a, b, c


@triton.jit
def rmsprop_centered_momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop_centered; c = momentum_buffer"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    if MOVES:
        d, a, b, _ = rmsprop_centered(p, g, a, b, c, s, h, MOVES)
        c = momentum * c + d
    return c, a, b, c


@triton.jit
def adam(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    coupled, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decoupled = h
    inverse_bias_correction1, inverse_bias_correction2_sqrt = s
    if MOVES:
        g += coupled * p
        a = _lerp(a, g, one_minus_beta1, beta1)
        b = beta2 * b + one_minus_beta2 * (g * g)
    return (
        tl.div_rn(a * inverse_bias_correction1, tl.sqrt_rn(b) * inverse_bias_correction2_sqrt + eps) + decoupled * p,
        a,
        b,
        c,
    )


@triton.jit
def _lerp(a, g, weight, rest):  # type: ignore[no-untyped-def]
    """a + weight * (g - a), in the form that is exact at both ends; rest = 1 - weight."""
    distance = g - a
    return tl.where(weight < 0.5, a + weight * distance, g - rest * distance)


@triton.jit
def _scale(i):  # type: ignore[no-untyped-def]
    """2^-(WIDTH i + LOWEST)"""
    exponent = i * -_WIDTH + (1023 - _LOWEST)  # as a float64 has it
    return (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _digits(values):  # type: ignore[no-untyped-def]
    """The sum of float32 numbers that are not negative, in digits; exact."""
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
def _load(pointer, index, held, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WHOLE:
        return tl.load(pointer + index)
    else:
        return tl.load(pointer + index, mask=held, other=0.0)


@triton.jit
def _store(pointer, index, value, held, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WHOLE:
        tl.store(pointer + index, value)
    else:
        tl.store(pointer + index, value, mask=held)


@triton.jit
def _do(  # type: ignore[no-untyped-def]
    row,
    index,
    held,
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
    WHOLE: tl.constexpr,
):
    weights = _at(row, 0, tl.float32, ALIGNMENT)
    first = _at(row, 2, tl.float32, ALIGNMENT)
    second = _at(row, 3, tl.float32, ALIGNMENT)
    third = _at(row, 4, tl.float32, ALIGNMENT)
    p = _load(weights, index, held, WHOLE)
    g = _load(_at(row, 1, GRAD, ALIGNMENT), index, held, WHOLE).to(tl.float32)
    a, b, c = 0.0, 0.0, 0.0
    if BUFFERS > 0:
        a = _load(first, index, held, WHOLE)
    if BUFFERS > 1:
        b = _load(second, index, held, WHOLE)
    if BUFFERS > 2:
        c = _load(third, index, held, WHOLE)
    s = tl.load(scales), tl.load(scales + 1)
    d, a, b, c = RULE(p, g, a, b, c, s, h, MODE != _APPLY)
    if MODE != _APPLY:
        if BUFFERS > 0:
            _store(first, index, a, held, WHOLE)
        if BUFFERS > 1:
            _store(second, index, b, held, WHOLE)
        if BUFFERS > 2:
            _store(third, index, c, held, WHOLE)
    if MODE == _MEASURE:
        d = tl.where(held, d, 0.0)  # 0 / 0 beyond the end, where eps is 0
        digit = squares + tl.arange(0, _DIGITS)
        tl.store(digit, _digits(tl.sum(tl.reshape(p * p, (SIZE // GROUP, GROUP)), axis=1)))
        tl.store(digit + _DIGITS, _digits(tl.sum(tl.reshape(d * d, (SIZE // GROUP, GROUP)), axis=1)))
    else:
        _store(weights, index, p - tl.load(scales + 2) * d, held, WHOLE)


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
    """One program for each piece. ALIGNMENT: what all addresses are multiples of, in bytes. GROUP: elements of a sum in
    float32."""
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
    held = index < tl.load(row + _NUMEL)
    scales += 3 * tensor
    squares += 2 * _DIGITS * piece
    # A mask would make loads of single elements of those of four, so that only the last piece of a tensor has one.
    if start + SIZE <= tl.load(row + _NUMEL):
        _do(row, index, held, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, SIZE, GROUP, True)
    else:
        _do(row, index, held, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, SIZE, GROUP, False)


@triton.jit
def add_up(table, squares, totals, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program for each tensor and column: the digits of its pieces, and what of them belongs to the next digit."""
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


RULES: dict[str, Any] = {
    rule.__name__: rule
    for rule in (
        sgd,
        momentum,
        nesterov,
        adagrad,
        rmsprop,
        rmsprop_centered,
        rmsprop_momentum,
        rmsprop_centered_momentum,
        adam,
    )
}
