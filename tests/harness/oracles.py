"""Every rule once more, in float64 and one tensor after the other, as the papers write them: what tests compare with.

Nothing here is shared with `distopt` or `torch.optim`. A rule takes the first parameters, a gradient function
`grad(params, step)` (step 0 is the first; the function may be asked elsewhere than at the current parameters), the
number of steps and hyper-parameters, and returns the parameters after each step. `lr`, `weight_decay` and
`trust_ratio` are one value for all tensors or a sequence with one for each, as param groups have them.

What acts on gradients makes one gradient function of another, so it goes with every rule:
`adamw(params, clipped(sam(grad, rho=0.05), max_norm=1.0), steps, lr=1e-3)`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = list[Tensor]
Grad = Callable[[Params, int], Params]
Each = float | Sequence[float]
Betas = Bounds = tuple[float, float]


def gradient_of(loss: Callable[[Params, int], Tensor]) -> Grad:
    """The gradient function of `loss(params, step)`, by autograd."""

    def grad(params: Params, step: int) -> Params:
        leaves = [p.detach().requires_grad_() for p in params]
        return list(torch.autograd.grad(loss(leaves, step), leaves))

    return grad


def l2(grad: Grad, weight_decay: Each) -> Grad:
    """The gradient of loss + weight_decay / 2 * |x|^2: g + weight_decay x. Goes outside of `clipped` and `sam`."""
    return lambda params, step: [
        g + _of(weight_decay, i) * x for i, (x, g) in enumerate(zip(params, grad(params, step)))
    ]


def clipped(grad: Grad, max_norm: float) -> Grad:
    """Clipping by the global norm: g / max(1, |g| / c), |g| over all tensors.

    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1,
    https://arxiv.org/abs/1211.5063 (torch's clip_grad_norm_ divides by |g| + 1e-6).
    """

    def clipped_grad(params: Params, step: int) -> Params:
        grads = grad(params, step)
        return [g / max(1.0, _norm(*grads) / max_norm) for g in grads]

    return clipped_grad


def sam(grad: Grad, rho: float) -> Grad:
    """Sharpness-aware minimization: the gradient at w + e, e = rho g / |g|, of the same batch; |g| over all tensors.

    P. Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021, equations 2 and 3
    for p = 2, https://arxiv.org/abs/2010.01412 (whose e is undefined for g = 0; here it is 0).
    """

    def sharp_grad(params: Params, step: int) -> Params:
        grads = grad(params, step)
        norm = _norm(*grads)
        return grad([w + (rho * g / norm if norm > 0 else 0.0) for w, g in zip(params, grads)], step)

    return sharp_grad


def sgd(params: Params, grad: Grad, steps: int, *, lr: Each, weight_decay: Each = 0.0) -> list[Params]:
    """Gradient descent: x <- x - lr g, with L2 weight decay in g."""

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        return x - _of(lr, i) * g

    return _run(params, l2(grad, weight_decay), steps, update)


def trusted_sgd(
    params: Params, grad: Grad, steps: int, *, lr: Each, weight_decay: Each = 0.0, trust_ratio: Each = True
) -> list[Params]:
    """Gradient descent with LAMB's ratio: x <- x - lr |x| / |g| g, tensor by tensor; the ratio is 1 as in `lamb`."""

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        ratio = _norm(x) / _norm(g) if _of(trust_ratio, i) and _norm(x) > 0 and _norm(g) > 0 else 1.0
        return x - _of(lr, i) * ratio * g

    return _run(params, l2(grad, weight_decay), steps, update)


def heavy_ball(
    params: Params, grad: Grad, steps: int, *, lr: Each, momentum: float, weight_decay: Each = 0.0
) -> list[Params]:
    """Polyak's momentum: v <- mu v - lr g; x <- x + v.

    B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964,
    https://doi.org/10.1016/0041-5553(64)90137-5
    """
    v = defaultdict(float)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        v[i] = momentum * v[i] - _of(lr, i) * g
        return x + v[i]

    return _run(params, l2(grad, weight_decay), steps, update)


def averaged_momentum(
    params: Params, grad: Grad, steps: int, *, lr: Each, beta: float, dampening: float, weight_decay: Each = 0.0
) -> list[Params]:
    """Momentum as an average: v <- beta v + (1 - dampening) g; x <- x - lr v, started from v_1 = g_1.

    With dampening = beta, v is the moving average of the gradients; the start, which is torch's, spares v the bias
    towards zero that v_0 = 0 gives.
    """
    v: dict[int, Tensor] = {}

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        v[i] = g if t == 1 else beta * v[i] + (1 - dampening) * g
        return x - _of(lr, i) * v[i]

    return _run(params, l2(grad, weight_decay), steps, update)


def nesterov(
    params: Params, grad: Grad, steps: int, *, lr: Each, momentum: float, weight_decay: Each = 0.0
) -> list[Params]:
    """Nesterov's momentum, looking ahead: v <- mu v - lr grad(x + mu v); x <- x + v. Returns x + mu v of each step.

    That is the point where the next gradient is taken, and the one an optimizer that holds one copy of the parameters
    keeps. I. Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, equations 3
    and 4, https://proceedings.mlr.press/v28/sutskever13.html
    """
    grad = l2(grad, weight_decay)
    x = [p.detach().double() for p in params]
    v = [torch.zeros_like(p) for p in x]
    ahead = []
    for step in range(steps):
        grads = grad([p + momentum * u for p, u in zip(x, v)], step)
        v = [momentum * u - _of(lr, i) * g for i, (u, g) in enumerate(zip(v, grads))]
        x = [p + u for p, u in zip(x, v)]
        ahead.append([p + momentum * u for p, u in zip(x, v)])
    return ahead


def adagrad(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    eps: float = 1e-10,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    weight_decay: Each = 0.0,
) -> list[Params]:
    """Adagrad: G <- G + g^2; x <- x - lr / (1 + (t - 1) lr_decay) g / (sqrt(G) + eps).

    J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", 2011,
    figure 1 (diagonal; delta is eps), https://jmlr.org/papers/v12/duchi11a.html. Not sqrt(G + eps).
    """
    total = defaultdict(lambda: initial_accumulator_value)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        total[i] = total[i] + g**2
        return x - _of(lr, i) / (1 + (t - 1) * lr_decay) * g / (total[i].sqrt() + eps)

    return _run(params, l2(grad, weight_decay), steps, update)


def rmsprop(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: Each = 0.0,
) -> list[Params]:
    """RMSprop: s <- alpha s + (1 - alpha) g^2; b <- mu b + g / (sqrt(s) + eps); x <- x - lr b.

    T. Tieleman, G. Hinton, "Lecture 6.5: rmsprop", 2012. Centered, the variance s - (moving average of g)^2 stands for
    s: A. Graves, 2013, equations 38 to 41, https://arxiv.org/abs/1308.0850. eps is outside of the root, as in torch;
    both write it inside or not at all.
    """
    s = defaultdict(float)
    mean = defaultdict(float)
    b = defaultdict(float)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        s[i] = alpha * s[i] + (1 - alpha) * g**2
        mean[i] = alpha * mean[i] + (1 - alpha) * g
        variance = s[i] - mean[i] ** 2 if centered else s[i]
        b[i] = momentum * b[i] + g / (variance.sqrt() + eps)
        return x - _of(lr, i) * b[i]

    return _run(params, l2(grad, weight_decay), steps, update)


def adam(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.0,
) -> list[Params]:
    """Adam with L2 weight decay: x <- x - lr m_hat / (sqrt(v_hat) + eps).

    D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1,
    https://arxiv.org/abs/1412.6980
    """
    moments = _Moments(betas)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        m_hat, v_hat = moments(t, i, g)
        return x - _of(lr, i) * m_hat / (v_hat.sqrt() + eps)

    return _run(params, l2(grad, weight_decay), steps, update)


def adamw(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.01,
) -> list[Params]:
    """Adam with decoupled weight decay: x <- x - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay x).

    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, line 12,
    https://arxiv.org/abs/1711.05101 (where lr multiplies the first term only; torch has it multiply both).
    """
    moments = _Moments(betas)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        m_hat, v_hat = moments(t, i, g)
        return x - _of(lr, i) * (m_hat / (v_hat.sqrt() + eps) + _of(weight_decay, i) * x)

    return _run(params, grad, steps, update)


def muon(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    betas: Betas = (0.9, 0.95),
    weight_decay: Each = 0.1,
) -> list[Params]:
    """Muon for matrices, AdamW for vectors: the polynomial a s + b s^3 + c s^5 of the singular values s, by an SVD.

    A stack (three dimensions) matrix by matrix; a filter (four) as [out, in * height * width].

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/; J. Liu et al., "Muon is Scalable for LLM Training", 2025, equation 4,
    https://arxiv.org/abs/2502.16982; momentum as an average, as torch 2.13 has it.
    """
    moments, m = _Moments(betas), defaultdict(float)
    a, b, c = ns_coefficients

    def orthogonal(x: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / max(_norm(x), eps)
        for _ in range(ns_steps):
            s = a * s + b * s**3 + c * s**5
        rows, columns = x.shape
        factor = 0.2 * max(rows, columns) ** 0.5 if adjust_lr_fn == "match_rms_adamw" else max(1, rows / columns) ** 0.5
        return factor * (u * s) @ v

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        if x.ndim < 2:
            m_hat, v_hat = moments(t, i, g)
            return x - _of(lr, i) * (m_hat / (v_hat.sqrt() + 1e-8) + _of(weight_decay, i) * x)
        m[i] = momentum * m[i] + (1 - momentum) * g
        ahead = (1 - momentum) * g + momentum * m[i] if nesterov else m[i]
        if not x.numel():
            return x
        stack = ahead if x.ndim == 3 else ahead.reshape(1, len(x), -1)
        u = torch.stack([orthogonal(matrix) for matrix in stack]).view(x.shape)
        return x - _of(lr, i) * (u + _of(weight_decay, i) * x)

    return _run(params, grad, steps, update)


def lamb(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: Each = 0.01,
    trust_ratio: Each = True,
    trust_clip: Bounds | None = None,
) -> list[Params]:
    """LAMB: u = m_hat / (sqrt(v_hat) + eps) + weight_decay x; x <- x - lr |x| / |u| u, tensor by tensor.

    The ratio is 1 where either norm is 0, or where `trust_ratio` is false; `trust_clip` bounds the ratio.
    Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", v5, 2020, algorithm 2 with
    phi the identity, https://arxiv.org/abs/1904.00962 (whose phi, where it clips, clips |x| and not the ratio).
    """
    moments = _Moments(betas)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        m_hat, v_hat = moments(t, i, g)
        u = m_hat / (v_hat.sqrt() + eps) + _of(weight_decay, i) * x
        ratio = 1.0
        if _of(trust_ratio, i):
            if _norm(x) > 0 and _norm(u) > 0:
                ratio = _norm(x) / _norm(u)
            ratio = _bounded(ratio, trust_clip)
        return x - _of(lr, i) * ratio * u

    return _run(params, grad, steps, update)


def lars(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    weight_decay: Each = 0.0,
    trust_ratio: Each = True,
    trust_clip: Bounds | None = None,
) -> list[Params]:
    """LARS: v <- mu v + lr lambda (g + weight_decay x); x <- x - v, lambda = eta |x| / (|g| + weight_decay |x|).

    eta is `trust_coefficient`. lambda is 1 where |x| or |g| is 0, or where `trust_ratio` is false; `trust_clip` bounds
    it. Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks", 2017, algorithm 1,
    https://arxiv.org/abs/1708.03888
    """
    v = defaultdict(float)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        decay, local_rate = _of(weight_decay, i), 1.0
        if _of(trust_ratio, i):
            if _norm(x) > 0 and _norm(g) > 0:
                local_rate = trust_coefficient * _norm(x) / (_norm(g) + decay * _norm(x))
            local_rate = _bounded(local_rate, trust_clip)
        v[i] = momentum * v[i] + _of(lr, i) * local_rate * (g + decay * x)
        return x - v[i]

    return _run(params, grad, steps, update)


def lion(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.99),
    weight_decay: Each = 0.0,
) -> list[Params]:
    """Lion: c = beta1 m + (1 - beta1) g; x <- x - lr (sign(c) + weight_decay x); m <- beta2 m + (1 - beta2) g.

    X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2, https://arxiv.org/abs/2302.06675
    """
    m = defaultdict(float)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        c = betas[0] * m[i] + (1 - betas[0]) * g
        m[i] = betas[1] * m[i] + (1 - betas[1]) * g
        return x - _of(lr, i) * (c.sign() + _of(weight_decay, i) * x)

    return _run(params, grad, steps, update)


def adafactor(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: Each = 0.0,
    machine_epsilon: float = 2.0**-52,
) -> list[Params]:
    """Adafactor: V = R C / sum(R) of the running sums R and C of the rows and columns of g^2; of a vector as Adam's.

    beta2 = 1 - t^beta2_decay; U = g / max(sqrt(V), eps1), U <- U / max(1, RMS(U) / d);
    x <- x - min(lr, 1 / sqrt(t)) max(eps2, RMS(x)) U - lr weight_decay x

    N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, algorithms 4 and 5,
    https://arxiv.org/abs/1804.04235, with eps1 and lr where torch 2.13 has them.
    """
    rows, columns, v = defaultdict(float), defaultdict(float), defaultdict(float)
    eps1 = machine_epsilon if eps[0] is None else eps[0]

    def rms(x: Tensor) -> float:
        return _norm(x) / math.sqrt(max(1, x.numel()))

    def second_moment(t: int, i: int, g: Tensor) -> Tensor:
        beta2 = 1 - t**beta2_decay
        if g.ndim < 2:
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            return v[i]
        rows[i] = beta2 * rows[i] + (1 - beta2) * (g**2).sum(-1) / max(1, g.shape[-1])
        columns[i] = beta2 * columns[i] + (1 - beta2) * (g**2).sum(-2) / max(1, g.shape[-2])
        mean = (rows[i].sum(-1) / g.shape[-2]).clamp(min=eps1)
        return torch.einsum("...r,...c->...rc", rows[i], columns[i]) / mean[..., None, None]

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        u = g / second_moment(t, i, g).sqrt().clamp(min=eps1)
        u = u / max(1.0, rms(u) / d)
        relative = min(_of(lr, i), 1 / math.sqrt(t)) * max(eps[1], rms(x))
        return x - relative * u - _of(lr, i) * _of(weight_decay, i) * x

    return _run(params, grad, steps, update)


def ademamix(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    beta3: float = 0.9999,
    alpha: float = 2.0,
    warmup: int | None = None,
    eps: float = 1e-8,
    weight_decay: Each = 0.0,
) -> list[Params]:
    """AdEMAMix: x <- x - lr ((m1_hat + alpha_t m2) / (sqrt(v_hat) + eps) + weight_decay x).

    m2 is an average with beta3_t, without a correction. M. Pagliardini, P. Ablin, D. Grangier, "The AdEMAMix Optimizer:
    Better, Faster, Older", 2024, algorithm 1 with the schedules of section 3, https://arxiv.org/abs/2409.03137:

        alpha_t = alpha min(t / T, 1)
        beta3_t = min(exp(ln b1 ln b3 / ((1 - t / T) ln b3 + t / T ln b1)), b3)
    """
    moments, m2 = _Moments(betas), defaultdict(float)
    ln1, ln3 = math.log(betas[0]), math.log(beta3)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        alpha_t, beta3_t = alpha, beta3
        if warmup is not None and t < warmup:
            alpha_t = alpha * t / warmup
            beta3_t = min(math.exp(ln1 * ln3 / ((1 - t / warmup) * ln3 + t / warmup * ln1)), beta3)
        m_hat, v_hat = moments(t, i, g)
        m2[i] = beta3_t * m2[i] + (1 - beta3_t) * g
        return x - _of(lr, i) * ((m_hat + alpha_t * m2[i]) / (v_hat.sqrt() + eps) + _of(weight_decay, i) * x)

    return _run(params, grad, steps, update)


def adopt(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.9999),
    eps: float = 1e-6,
    clip_exponent: float | None = 0.25,
    weight_decay: Each = 0.0,
) -> list[Params]:
    """ADOPT: m <- beta1 m + (1 - beta1) clip(g_t / max(sqrt(v_{t-1}), eps), c_t); x <- x - lr (m + weight_decay x).

    v_0 = g_0^2, for which the first of `steps` is spent: it is t = 0. S. Taniguchi et al., "ADOPT: Modified Adam Can
    Converge with Any beta2 with the Optimal Rate", 2024, algorithm 2 (algorithm 1 without a clip_exponent),
    https://arxiv.org/abs/2411.02853; the decoupled weight decay is that of the authors' code, decouple=True.
    """
    m, v = defaultdict(float), {}

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        if t == 1:
            v[i] = g**2
            return x
        scaled = g / torch.maximum(v[i].sqrt(), torch.full_like(g, eps))
        if clip_exponent is not None:
            c = (t - 1) ** clip_exponent
            scaled = torch.minimum(torch.maximum(scaled, torch.full_like(g, -c)), torch.full_like(g, c))
        m[i] = betas[0] * m[i] + (1 - betas[0]) * scaled
        v[i] = betas[1] * v[i] + (1 - betas[1]) * g**2
        return x - _of(lr, i) * (m[i] + _of(weight_decay, i) * x)

    return _run(params, grad, steps, update)


def cautious_adamw(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.01,
    trust_ratio: Each = False,
    cautious: bool = False,
    cautious_decay: bool = False,
) -> list[Params]:
    """AdamW with a mask phi = [u g > 0] on u = m_hat / (sqrt(v_hat) + eps), and one on the decay, [u x >= 0].

    u <- u phi / max(mean(phi), 1e-3), then decay, then LAMB's ratio. K. Liang et al., "Cautious Optimizers: Improving
    Training with One Line of Code", 2024, algorithm 2, https://arxiv.org/abs/2411.16085, with the mean as in the
    authors' c_adamw.py (the paper divides by (|phi|_0 + 1) / d). L. Chen et al., "Cautious Weight Decay", 2025,
    https://arxiv.org/abs/2510.12402.
    """
    moments = _Moments(betas)

    def update(t: int, i: int, x: Tensor, g: Tensor) -> Tensor:
        m_hat, v_hat = moments(t, i, g)
        u = m_hat / (v_hat.sqrt() + eps)
        if cautious and x.numel():
            kept = (u * g > 0).double()
            u = u * kept / max(kept.mean().item(), 1e-3)
        decayed = torch.where(u * x >= 0, x, 0.0) if cautious_decay else x
        u = u + _of(weight_decay, i) * decayed
        ratio = _norm(x) / _norm(u) if _of(trust_ratio, i) and _norm(x) > 0 and _norm(u) > 0 else 1.0
        return x - _of(lr, i) * ratio * u

    return _run(params, grad, steps, update)


def sgd_schedule_free(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    beta: float = 0.9,
    weight_decay: Each = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    evaluated: bool = False,
) -> list[Params]:
    """Schedule-free SGD: y = (1 - beta) z + beta x; z <- z - lr g(y); x <- (1 - c) x + c z. Returns the y of each step,
    or the x where `evaluated`.

    c is the weight t^r lr^power of a step, over the sum of all so far. A. Defazio et al., "The Road Less Scheduled",
    2024, equations 1 to 3, https://arxiv.org/abs/2405.15682; r is that of the authors' code, 0 in the paper.
    """
    average = _Average(params, beta, lr, r, weight_lr_power, evaluated)
    return [average.step(l2(grad, weight_decay)(average.y(), step)) for step in range(steps)]


def adamw_schedule_free(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    evaluated: bool = False,
) -> list[Params]:
    """Schedule-free AdamW: as `sgd_schedule_free`, by g / (sqrt(v_hat) + eps) + weight_decay y in place of g.

    The paper's Algorithm 1 has the bias correction of v in lr; this is Adam's, of v itself.
    """
    average, moments = _Average(params, betas[0], lr, r, weight_lr_power, evaluated), _Moments((0.0, betas[1]))
    trajectory = []
    for step in range(steps):
        y = average.y()
        v_hat = [moments(step + 1, i, g) for i, g in enumerate(grad(y, step))]
        u = [g / (v.sqrt() + eps) + _of(weight_decay, i) * p for i, (p, (g, v)) in enumerate(zip(y, v_hat))]
        trajectory.append(average.step(u))
    return trajectory


def prodigy(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.0,
    d0: float = 1e-6,
    d_coef: float = 1.0,
) -> list[Params]:
    """Prodigy: Adam on d g, with steps of lr d; d = max(d, r / |s|_1), r and |s|_1 over all tensors.

    K. Mishchenko, A. Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2024, algorithm 4,
    https://arxiv.org/abs/2306.06101, with AdamW's decay, x <- x - lr d weight_decay x. lr is the same for all tensors.
    """
    (beta1, beta2), rate = betas, _of(lr, 0)
    root = math.sqrt(beta2)
    start = [p.detach().double() for p in params]
    x, d, r = list(start), d0, 0.0
    m, v, s = ([torch.zeros_like(p) for p in start] for _ in range(3))
    trajectory = []
    for step in range(steps):
        grads = grad(x, step)
        m = [beta1 * a + (1 - beta1) * d * g for a, g in zip(m, grads)]
        v = [beta2 * a + (1 - beta2) * (d * g) ** 2 for a, g in zip(v, grads)]
        inner = sum(float((g * (x0 - p)).sum()) for g, x0, p in zip(grads, start, x))
        r = root * r + (1 - root) * rate * d**2 * inner
        s = [root * a + (1 - root) * rate * d**2 * g for a, g in zip(s, grads)]
        x = [
            p - rate * d * (a / (b.sqrt() + d * eps) + _of(weight_decay, i) * p)
            for i, (p, a, b) in enumerate(zip(x, m, v))
        ]
        norm = sum(float(a.abs().sum()) for a in s)
        d = max(d, d_coef * r / norm) if norm else d
        trajectory.append(x)
    return trajectory


def dadapt_adam(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Each = 0.0,
    d0: float = 1e-6,
    d_coef: float = 1.0,
) -> list[Params]:
    """D-Adaptation for Adam: x <- x - A^-1 m, m of lr d g, A = diag(sqrt(v) + eps); r and |s|_1 over all tensors.

    A. Defazio, K. Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023, the variant for Adam,
    https://arxiv.org/abs/2301.07733, with AdamW's decay, x <- x - lr d weight_decay x. lr is the same for all tensors.
    """
    (beta1, beta2), rate = betas, _of(lr, 0)
    root = math.sqrt(beta2)
    x, d, r = [p.detach().double() for p in params], d0, 0.0
    m, v, s = ([torch.zeros_like(p) for p in x] for _ in range(3))
    trajectory = []
    for step in range(steps):
        grads = grad(x, step)
        m = [beta1 * a + (1 - beta1) * rate * d * g for a, g in zip(m, grads)]
        v = [beta2 * a + (1 - beta2) * g**2 for a, g in zip(v, grads)]
        diagonal = [a.sqrt() + eps for a in v]
        x = [p - a / b - rate * d * _of(weight_decay, i) * p for i, (p, a, b) in enumerate(zip(x, m, diagonal))]
        inner = sum(float((g * a / b).sum()) for g, a, b in zip(grads, s, diagonal))
        r = root * r + (1 - root) * rate * d * inner
        s = [root * a + (1 - root) * rate * d * g for a, g in zip(s, grads)]
        norm = sum(float(a.abs().sum()) for a in s)
        d = max(d, d_coef * r / ((1 - root) * norm)) if norm else d
        trajectory.append(x)
    return trajectory


def dadapt_sgd(
    params: Params,
    grad: Grad,
    steps: int,
    *,
    lr: Each,
    momentum: float = 0.0,
    weight_decay: Each = 0.0,
    d0: float = 1e-6,
    d_coef: float = 1.0,
) -> list[Params]:
    """D-Adaptation for SGD: l = d lr / |g_0|; s <- s + l g; z <- z - l g; x <- momentum x + (1 - momentum) z;
    d <- max(d, 2 sum of l <g, s before> / |s|); norms and inner products over all tensors.

    A. Defazio, K. Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023, algorithm 4,
    https://arxiv.org/abs/2301.07733. lr is the same for all tensors.
    """
    grad = l2(grad, weight_decay)
    x, d, r, first = [p.detach().double() for p in params], d0, 0.0, 0.0
    z, s = [p.clone() for p in x], [torch.zeros_like(p) for p in x]
    trajectory = []
    for step in range(steps):
        grads = grad(x, step)
        first = first or _norm(*grads)
        if first:
            rate = d * _of(lr, 0) / first
            r += rate * sum(float((g * a).sum()) for g, a in zip(grads, s))
            s = [a + rate * g for a, g in zip(s, grads)]
            z = [a - rate * g for a, g in zip(z, grads)]
            x = [momentum * a + (1 - momentum) * b for a, b in zip(x, z)]
            d = max(d, d_coef * 2 * r / _norm(*s))
        trajectory.append(x)
    return trajectory


class _Average:
    """The iterates z and their average x, of schedule-free optimizers."""

    def __init__(self, params: Params, beta: float, lr: Each, r: float, power: float, evaluated: bool) -> None:
        self.evaluated = evaluated
        self.x = [p.detach().double() for p in params]
        self.z = [p.clone() for p in self.x]
        self.beta, self.lr, self.r, self.power = beta, lr, r, power
        self.weights: list[list[float]] = []

    def y(self) -> Params:
        return [(1 - self.beta) * z + self.beta * x for z, x in zip(self.z, self.x)]

    def step(self, updates: Params) -> Params:
        t = len(self.weights) + 1
        self.weights.append([t**self.r * _of(self.lr, i) ** self.power for i in range(len(updates))])
        self.z = [z - _of(self.lr, i) * u for i, (z, u) in enumerate(zip(self.z, updates))]
        shares = [own[-1] / sum(own) for own in zip(*self.weights)]
        self.x = [(1 - c) * x + c * z for c, x, z in zip(shares, self.x, self.z)]
        return self.x if self.evaluated else self.y()


class _Moments:
    """Adam's m_hat and v_hat of tensor number i after its t-th gradient."""

    def __init__(self, betas: Betas) -> None:
        self.betas = betas
        self.m = defaultdict(float)
        self.v = defaultdict(float)

    def __call__(self, t: int, i: int, g: Tensor) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
        self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
        return self.m[i] / (1 - beta1**t), self.v[i] / (1 - beta2**t)


def _run(params: Params, grad: Grad, steps: int, update: Callable[[int, int, Tensor, Tensor], Tensor]) -> list[Params]:
    """x_i <- update(t, i, x_i, g_i) for each tensor i, at t = 1 .. steps; all x_i after each t."""
    x = [p.detach().double() for p in params]
    trajectory = []
    for t in range(1, steps + 1):
        x = [update(t, i, x_i, g_i) for i, (x_i, g_i) in enumerate(zip(x, grad(x, t - 1)))]
        trajectory.append(x)
    return trajectory


def _of(value: Each, i: int) -> float:
    """The value for tensor number i."""
    return value[i] if isinstance(value, Sequence) else value


def _bounded(ratio: float, bounds: Bounds | None) -> float:
    """The ratio, or the bound that it exceeds."""
    return ratio if bounds is None else min(max(ratio, bounds[0]), bounds[1])


def _norm(*tensors: Tensor) -> float:
    """The 2-norm of all elements together."""
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
