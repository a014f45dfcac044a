"""SAM's family once more, in float64, as the papers write it, on lists of full tensors: what tests compare with.

As `clipped` and `sam` of `tests.harness.oracles`, each makes one gradient function of another, to be given to any rule
there: `adamw(params, asam(grad, rho=0.5, eta=0.01), steps, lr=1e-3)`. Those that remember (a mean, a momentum) have to
be asked once for every step, in order. Nothing here is shared with `distopt`. `rho` is one value, or one for each
tensor; the norm is over all tensors all the same, but for those whose rho is 0, which have no part in the perturbation
at all.

`second` is the gradient function of the second pass, where that is another one: of a model that uses other parameters
there. Either may give None for a tensor. It is not perturbed without the first, and without the second the result is
None and what the algorithm remembers of it stays; in norms and products None is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.harness.oracles import Each, Grad, Params, _norm, _of


def every(interval: int, grad: Grad, sharp: Grad) -> Grad:
    """The sharp gradient at steps 0, k, 2k and so on, the plain one at the others."""
    return lambda params, step: (grad if step % interval else sharp)(params, step)


def sam(grad: Grad, rho: Each, second: Grad | None = None) -> Grad:
    """The gradient at w + rho g / |g|.

    P. Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021, equations 2 and 3.
    """
    return lambda params, step: (second or grad)(_moved(params, grad(params, step), rho), step)


def local_sam(grads: Sequence[Grad], rho: Each) -> Grad:
    """The mean over ranks of each one's own gradient at weights perturbed by that: the m-sharpness of Foret et al."""
    return mean_of([sam(grad, rho) for grad in grads])


def mean_of(grads: Sequence[Grad]) -> Grad:
    """The mean of the ranks' gradients, each of its own samples."""
    return lambda params, step: [sum(each) / len(grads) for each in zip(*(grad(params, step) for grad in grads))]


def asam(grad: Grad, rho: Each, eta: float, second: Grad | None = None) -> Grad:
    """The gradient at w + rho T^2 g / |T g|, T = |w| + eta for matrices, 1 for biases.

    J. Kwon et al., "ASAM", 2021, equation 7 and algorithm 1, with the element-wise T of section 3.
    """

    def sharp_grad(params: Params, step: int) -> Params:
        grads = [g if _of(rho, i) else None for i, g in enumerate(grad(params, step))]
        scales = [w.abs() + eta if w.ndim >= 2 else torch.ones_like(w) for w in params]
        norm = _length([t * g for t, g in zip(scales, grads) if g is not None])
        moves = [0.0 if g is None else _of(rho, i) * scales[i] ** 2 * g / norm for i, g in enumerate(grads)]
        return (second or grad)([w + move for w, move in zip(params, moves)], step)

    return sharp_grad


def awp(grad: Grad, rho: Each, second: Grad | None = None) -> Grad:
    """The gradient at w_l + rho |w_l| g_l / |g_l| for every layer l.

    D. Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020, equations 10 and 12, with one
    step of the ascent.
    """

    def sharp_grad(params: Params, step: int) -> Params:
        moved = []
        for i, (w, g) in enumerate(zip(params, grad(params, step))):
            still = g is None or _norm(g) == 0
            moved.append(w if still else w + _of(rho, i) * _norm(w) * g / _norm(g))
        return (second or grad)(moved, step)

    return sharp_grad


def gsam(grad: Grad, rho: Each, alpha: float, second: Grad | None = None) -> Grad:
    """g_p - alpha g_perp: g_p the gradient at the perturbed point, g_perp what of g is perpendicular to it.

    J. Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", 2022, algorithm 1. There g is
    split by the cosine of its angle to g_p: g_par = |g| cos g_p / |g_p|.
    """

    def sharp_grad(params: Params, step: int) -> Params:
        g, found = grad(params, step), sam(grad, rho, second)(params, step)
        g, g_p = _zeros(g, params), _zeros(found, params)
        cosine = _dot(g, g_p) / (_norm(*g) * _norm(*g_p))
        parallel = [_norm(*g) * cosine * b / _norm(*g_p) for b in g_p]
        return _where(found, [b - alpha * (a - c) for a, b, c in zip(g, g_p, parallel)])

    return sharp_grad


def friendly_sam(grad: Grad, rho: Each, sigma: float, decay: float, second: Grad | None = None) -> Grad:
    """The gradient at w + rho d / |d|, d = g - sigma m, m <- lambda m + (1 - lambda) g from m = 0.

    T. Li et al., "Friendly Sharpness-Aware Minimization", 2024, algorithm 1.
    """
    mean: list[Tensor | float] = []

    def sharp_grad(params: Params, step: int) -> Params:
        grads = grad(params, step)
        before = mean or [0.0] * len(grads)
        after = [m if g is None else decay * m + (1 - decay) * g for m, g in zip(before, grads)]
        new = [None if g is None else g - sigma * m for g, m in zip(grads, after)]
        found = (second or grad)(_moved(params, new, rho), step)
        mean[:] = [m if g is None else new for m, g, new in zip(before, found, after)]
        return found

    return sharp_grad


def look_sam(grad: Grad, rho: Each, interval: int, alpha: float, second: Grad | None = None) -> Grad:
    """SAM's gradient g_s at every k-th step, at the others g + alpha |g| / |g_v| g_v.

    g_v = g_s - |g_s| cos(g, g_s) g / |g| is kept from the last k-th step. Y. Liu et al., "Towards Efficient and
    Scalable Sharpness-Aware Minimization", 2022, algorithm 1.
    """
    kept: list[Tensor] = []

    def sharp_grad(params: Params, step: int) -> Params:
        found = grad(params, step)
        g = _zeros(found, params)
        if step % interval:
            v = _zeros(_where(found, kept), params)
            return _where(found, [a + alpha * _norm(*g) / _norm(*v) * b for a, b in zip(g, v)])
        found = sam(grad, rho, second)(params, step)
        g_s = _zeros(found, params)
        cosine = _dot(g, g_s) / (_norm(*g) * _norm(*g_s))
        new = [b - _norm(*g_s) * cosine * a / _norm(*g) for a, b in zip(g, g_s)]
        kept[:] = [v if b is None else n for v, b, n in zip(kept or _zeros([None] * len(g), params), found, new)]
        return found

    return sharp_grad


def momentum_sam(
    grad: Grad, rho: Each, interval: int = 1, *, decay: float, weight: float, weight_decay: Each = 0.0
) -> Grad:
    """The gradient at w - rho v / |v|, v <- decay v + weight (g + weight_decay w) from v = 0.

    That is SGD's momentum with weight = 1, and Adam's first moment with weight = 1 - decay. M. Becker et al.,
    "Momentum-SAM", 2024, algorithm 1 and, for Adam, its appendix.
    """
    v: list[Tensor] = []

    def sharp_grad(params: Params, step: int) -> Params:
        if not v:
            v[:] = [torch.zeros_like(w) for w in params]
        ahead = params if step % interval or not _norm(*v) else _moved(params, [-m for m in v], rho)
        grads = grad(ahead, step)
        v[:] = [
            m if g is None else decay * m + weight * (g + _of(weight_decay, i) * w)
            for i, (m, g, w) in enumerate(zip(v, grads, params))
        ]
        return grads

    return sharp_grad


def preconditioned_sam(grad: Grad, rho: Each, beta2: float, eps: float, second: Grad | None = None) -> Grad:
    """The gradient at w + rho d / |d|, d = g / (sqrt(v) + eps); v is Adam's second moment, of the steps before.

    S. P. Singh et al., "Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM", 2025.
    """
    then = second or grad
    return _preconditioned(lambda params, step: (grad(params, step), lambda at: then(at, step)), rho, beta2, eps)


Outputs = Callable[[Params, int], Tensor]
Criterion = Callable[[Tensor, int], Tensor]


def functional_sam(outputs: Outputs, criterion: Criterion, rho: Each) -> Grad:
    """J(w + rho g / |g|)^T u: u = dl/df and g = J(w)^T u at w; J = df/dw is written out, row by row.

    S. P. Singh et al., 2025, functional SAM.
    """

    def sharp_grad(params: Params, step: int) -> Params:
        g, at = _passes(outputs, criterion)(params, step)
        return at(_moved(params, g, rho))

    return sharp_grad


def functional_preconditioned_sam(outputs: Outputs, criterion: Criterion, rho: Each, beta2: float, eps: float) -> Grad:
    """Functional SAM at the perturbation of `preconditioned_sam`; Singh et al., 2025."""
    return _preconditioned(_passes(outputs, criterion), rho, beta2, eps)


_Passes = Callable[[Params, int], tuple[Params, Callable[[Params], Params]]]


def _passes(outputs: Outputs, criterion: Criterion) -> _Passes:
    """The gradient at w, and the function that gives the second pass's at another point."""

    def passes(params: Params, step: int) -> tuple[Params, Callable[[Params], Params]]:
        logits = outputs(params, step).detach().requires_grad_()
        (u,) = torch.autograd.grad(criterion(logits, step), logits)

        def at(point: Params) -> Params:
            jacobian = torch.autograd.functional.jacobian(lambda *ws: outputs(list(ws), step), tuple(point))
            return [torch.tensordot(u, j, dims=u.ndim) for j in jacobian]

        return at(params), at

    return passes


def _preconditioned(passes: _Passes, rho: Each, beta2: float, eps: float) -> Grad:
    v: list[Tensor] = []

    def sharp_grad(params: Params, step: int) -> Params:
        if not v:
            v[:] = [torch.zeros_like(w) for w in params]
        first, at = passes(params, step)
        scaled = [None if g is None else g / (s.sqrt() + eps) for g, s in zip(first, v)]
        grads = at(_moved(params, scaled, rho))
        v[:] = [s if g is None else beta2 * s + (1 - beta2) * g**2 for s, g in zip(v, grads)]
        return grads

    return sharp_grad


def _moved(params: Params, directions: Sequence[Tensor | None], rho: Each) -> Params:
    norm = _length([d for i, d in enumerate(directions) if d is not None and _of(rho, i)])
    return [w if d is None else w + _of(rho, i) * d / norm for i, (w, d) in enumerate(zip(params, directions))]


def _length(tensors: Params) -> float:
    return _norm(*tensors) or 1.0  # where there is nothing to perturb by


def _zeros(grads: Sequence[Tensor | None], params: Params) -> Params:
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, params)]


def _where(present: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Any]:
    return [None if p is None else value for p, value in zip(present, values)]


def _dot(a: Params, b: Params) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b))
