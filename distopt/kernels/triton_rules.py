"""The rules of distopt/optim in Triton: each number is read and written once, whatever the number of tensors.

A program works on one piece of one tensor. A row of `table` holds the addresses of a tensor's weights, gradient and up
to three state buffers, its length and the number of its first piece; a row of `scales` what differs between tensors,
the last of them what the direction is multiplied by. `MODE`:

    STEP     moves state and weights;
    MEASURE  moves the state, and adds up the squares of each piece's weights and of its direction;
    APPLY    makes the same direction again, from the state, and moves the weights.

So a layer whose direction has to be known whole before it may move (LAMB) needs no memory for it. What a mode does not
need, it does not read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

STEP, MEASURE, APPLY = range(3)
PIECE = 4096  # elements
WARPS = 8
COLUMNS = 7

_STEP, _MEASURE, _APPLY = tl.constexpr(STEP), tl.constexpr(MEASURE), tl.constexpr(APPLY)
_NUMEL, _FIRST, _COLUMNS = tl.constexpr(5), tl.constexpr(6), tl.constexpr(COLUMNS)


# A rule takes weights, gradient, its state a, b, c, the tensor's scales s and the group's hyper-parameters h. It
# returns the direction and the state; unless MOVES, that of a state which has moved already.


@triton.jit
def sgd(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = decay; s = -, rate of the gradient"""
    return s[1] * (g + h[0] * p), a, b, c


@triton.jit
def momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = decay, momentum; s = share of the gradient in the momentum, rate of the gradient"""
    if MOVES:
        a = h[1] * a + s[0] * (s[1] * (g + h[0] * p))
    return a, a, b, c


@triton.jit
def nesterov(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As momentum."""
    g = s[1] * (g + h[0] * p)
    if MOVES:
        a = h[1] * a + s[0] * g
    return g + h[1] * a, a, b, c


@triton.jit
def adagrad(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = decay, eps; s = 1 / (1 + (step - 1) lr_decay)"""
    g += h[0] * p
    if MOVES:
        a += g * g
    return tl.div_rn(g * s[0], tl.sqrt_rn(a) + h[1]), a, b, c


@triton.jit
def rmsprop(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = decay, alpha, 1 - alpha, eps, momentum; a = square_avg"""
    g += h[0] * p
    if MOVES:
        a = h[1] * a + h[2] * (g * g)
    return tl.div_rn(g, tl.sqrt_rn(a) + h[3]), a, b, c


@triton.jit
def rmsprop_centered(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = grad_avg"""
    g += h[0] * p
    if MOVES:
        a = h[1] * a + h[2] * (g * g)
        b += h[2] * (g - b)
    variance = a - b * b
    variance = tl.where(variance < 0.0, 0.0, variance)  # nan stays nan
    return tl.div_rn(g, tl.sqrt_rn(variance) + h[3]), a, b, c


@triton.jit
def rmsprop_momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = momentum_buffer"""
    if MOVES:
        d, a, _, _ = rmsprop(p, g, a, b, c, s, h, MOVES)
        b = h[4] * b + d
    return b, a, b, c


@triton.jit
def rmsprop_centered_momentum(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop_centered; c = momentum_buffer"""
    if MOVES:
        d, a, b, _ = rmsprop_centered(p, g, a, b, c, s, h, MOVES)
        c = h[4] * c + d
    return c, a, b, c


@triton.jit
def adam(p, g, a, b, c, s, h, MOVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = decay in the gradient, 1 - beta1, beta2, 1 - beta2, eps, decay beside; s = 1 / bias1, 1 / sqrt(bias2)"""
    if MOVES:
        g += h[0] * p
        a += h[1] * (g - a)
        b = h[2] * b + h[3] * (g * g)
    return tl.div_rn(a * s[0], tl.sqrt_rn(b) * s[1] + h[4]) + h[5] * p, a, b, c


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
        tl.store(squares, tl.sum(p * p, axis=0))
        tl.store(squares + 1, tl.sum(d * d, axis=0))
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
):
    """One program for each piece. ALIGNMENT: what all addresses are multiples of, in bytes."""
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
    squares += 2 * piece
    # A mask would make loads of single elements of those of four, so that only the last piece of a tensor has one.
    if start + SIZE <= tl.load(row + _NUMEL):
        _do(row, index, held, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, True)
    else:
        _do(row, index, held, scales, squares, h, RULE, MODE, BUFFERS, GRAD, ALIGNMENT, False)


@triton.jit
def add_up(table, squares, totals, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program for each tensor: the squares of its pieces, always in the same order, in float64."""
    tensor = tl.program_id(0)
    row = table + tensor * _COLUMNS
    first = tl.load(row + _FIRST)
    last = first + tl.cdiv(tl.load(row + _NUMEL), SIZE)
    weight = tl.zeros([BLOCK], tl.float64)
    update = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        weight += tl.load(squares + 2 * piece, mask=piece < last, other=0.0).to(tl.float64)
        update += tl.load(squares + 2 * piece + 1, mask=piece < last, other=0.0).to(tl.float64)
    tl.store(totals + 2 * tensor, tl.sum(weight, axis=0))
    tl.store(totals + 2 * tensor + 1, tl.sum(update, axis=0))


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
