"""The update rules in Triton, element by element.

A rule takes weights, gradient, up to three state buffers a, b and c, the tensor's scales s and the group's scalars h,
both by the names and in the order of the rule's specification (`distopt.kernels.rules.Rule`). It returns the direction
and the state. Unless UPDATES, the state is the new one already, and the direction is computed from it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def sgd(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    (weight_decay,) = h
    ratio, _ = s
    return ratio * (g + weight_decay * p), a, b, c


@triton.jit
def momentum(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, momentum = h
    ratio, one_minus_dampening = s
    if UPDATES:
        a = momentum * a + one_minus_dampening * (ratio * (g + weight_decay * p))
    return a, a, b, c


@triton.jit
def nesterov(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, momentum = h
    ratio, one_minus_dampening = s
    g = ratio * (g + weight_decay * p)
    if UPDATES:
        a = momentum * a + one_minus_dampening * g
    return g + momentum * a, a, b, c


@triton.jit
def adagrad(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    weight_decay, eps = h
    inverse_rate_decay, _ = s
    g += weight_decay * p
    if UPDATES:
        a += g * g
    return tl.div_rn(g * inverse_rate_decay, tl.sqrt_rn(a) + eps), a, b, c


@triton.jit
def rmsprop(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """a = square_avg."""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    g += weight_decay * p
    if UPDATES:
        a = alpha * a + one_minus_alpha * (g * g)
    return tl.div_rn(g, tl.sqrt_rn(a) + eps), a, b, c


@triton.jit
def rmsprop_centered(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = grad_avg"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    g += weight_decay * p
    if UPDATES:
        a = alpha * a + one_minus_alpha * (g * g)
        b = _lerp(b, g, one_minus_alpha, alpha)
    variance = a - b * b
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays NaN
    return tl.div_rn(g, tl.sqrt_rn(variance) + eps), a, b, c


@triton.jit
def rmsprop_momentum(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop; b = momentum_buffer"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    if UPDATES:
        d, a, _, _ = rmsprop(p, g, a, b, c, s, h, UPDATES)
        b = momentum * b + d
    return b, a, b, c


@triton.jit
def rmsprop_centered_momentum(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """As rmsprop_centered; c = momentum_buffer"""
    weight_decay, alpha, one_minus_alpha, eps, momentum = h
    if UPDATES:
        d, a, b, _ = rmsprop_centered(p, g, a, b, c, s, h, UPDATES)
        c = momentum * c + d
    return c, a, b, c


@triton.jit
def adam(p, g, a, b, c, s, h, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    coupled, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decoupled = h
    inverse_bias_correction1, inverse_bias_correction2_sqrt = s
    if UPDATES:
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
    """Returns a + weight * (g - a), in the form that is exact at both ends; rest = 1 - weight."""
    distance = g - a
    return tl.where(weight < 0.5, a + weight * distance, g - rest * distance)


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
