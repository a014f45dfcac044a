"""The update rules of a case in float64, one tensor after the other, with state that can be looked at in mid-run.

Written from the papers' formulas. In the state of a parameter `t` is the number of steps taken, `v` and `s` are the
first and second moments, by which SAM's family finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Any]

PENALTY = ("SGD", "LARS", "Adagrad", "RMSprop", "Adam")  # whose weight decay is a part of the gradient
AVERAGING = ("SGDScheduleFree", "AdamWScheduleFree")
COUPLED = ("Prodigy", "DAdaptAdam", "DAdaptSGD")  # whose steps depend on all parameters together
OTHERS = {"adamw": "AdamW", "lion": "Lion"}  # the rules of Muon's groups beside its own


def moved(kind: str, group: Group, state: State, x: Tensor, g: Tensor) -> Tensor:
    """x after one step of a rule that knows one parameter at a time."""
    kind = OTHERS.get(group.get("rule", ""), kind)
    state["t"] = t = state.get("t", 0) + 1
    g = -g if group.get("maximize") else g
    decay = group["weight_decay"]
    if kind in AVERAGING:
        return _averaged(kind, group, state, x, g)
    if kind == "ADOPT" and t == 1:  # the first gradient is for the second moment alone
        state["s"] = g**2
        return x
    penalized = g + decay * x if kind in PENALTY else g
    if kind in ("SGD", "LARS"):
        u = _momentum(kind, group, state, x, penalized, g)
    elif kind == "Adafactor":
        u = _adafactor(group, state, x, g)
    else:
        u = _DIRECTIONS[kind](group, state, penalized)
    if group.get("cautious") and x.numel():
        kept = (u.sign() * penalized.sign() > 0).double()
        u = u * kept / max(kept.mean().item(), 1e-3)
    if kind not in PENALTY:
        spared = u.sign() * x.sign() < 0 if group.get("cautious_decay") else torch.zeros_like(x, dtype=torch.bool)
        u = u + decay * x.masked_fill(spared, 0.0)
    ratio = 1.0
    if kind != "LARS" and group.get("trust_ratio"):
        ratio = _bounded(_ratio(length(x), length(u)), group)
    return x - group["lr"] * ratio * u


def _momentum(kind: str, group: Group, state: State, x: Tensor, decayed: Tensor, g: Tensor) -> Tensor:
    if kind == "LARS" and group.get("trust_ratio"):
        weight = length(x)
        bottom = length(g) + group["weight_decay"] * weight
        local = group["trust_coefficient"] * weight / bottom if weight > 0 and length(g) > 0 else 1.0
        decayed = _bounded(local, group) * decayed
    mu = group["momentum"]
    if mu == 0.0:
        return decayed
    state["v"] = mu * state["v"] + (1 - group["dampening"]) * decayed if "v" in state else decayed
    return decayed + mu * state["v"] if group["nesterov"] else state["v"]


def _adagrad(group: Group, state: State, g: Tensor) -> Tensor:
    state["s"] = state.get("s", group["initial_accumulator_value"]) + g**2
    return g / (1 + (state["t"] - 1) * group["lr_decay"]) / (state["s"].sqrt() + group["eps"])


def _rmsprop(group: Group, state: State, g: Tensor) -> Tensor:
    alpha = group["alpha"]
    state["s"] = alpha * state.get("s", 0.0) + (1 - alpha) * g**2
    variance = state["s"]
    if group["centered"]:
        state["mean"] = alpha * state.get("mean", 0.0) + (1 - alpha) * g
        variance = variance - state["mean"] ** 2
    u = g / (variance.sqrt() + group["eps"])
    if group["momentum"] == 0.0:
        return u
    state["v"] = group["momentum"] * state.get("v", 0.0) + u
    return state["v"]


def _moments(group: Group, state: State, g: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's, without the bias of their start."""
    (beta1, beta2), t = group["betas"], state["t"]
    state["v"] = beta1 * state.get("v", 0.0) + (1 - beta1) * g
    state["s"] = beta2 * state.get("s", 0.0) + (1 - beta2) * g**2
    return state["v"] / (1 - beta1**t), state["s"] / (1 - beta2**t)


def _adam(group: Group, state: State, g: Tensor) -> Tensor:
    m_hat, v_hat = _moments(group, state, g)
    return m_hat / (v_hat.sqrt() + group["eps"])


def _lion(group: Group, state: State, g: Tensor) -> Tensor:
    (beta1, beta2), m = group["betas"], state.get("v", 0.0)
    state["v"] = beta2 * m + (1 - beta2) * g
    return (beta1 * m + (1 - beta1) * g).sign()


def _ademamix(group: Group, state: State, g: Tensor) -> Tensor:
    beta1, beta3, share = group["betas"][0], group["beta3"], 1.0
    if group["slow_warmup"] is not None:
        share = min(1.0, state["t"] / group["slow_warmup"])
    inverse = (1 - share) * (1 / math.log(beta1) if beta1 else 0.0) + share / math.log(beta3)
    slow = math.exp(1 / inverse)
    m_hat, v_hat = _moments(group, state, g)
    state["slow"] = slow * state.get("slow", 0.0) + (1 - slow) * g
    return (m_hat + share * group["slow_weight"] * state["slow"]) / (v_hat.sqrt() + group["eps"])


def _adopt(group: Group, state: State, g: Tensor) -> Tensor:
    beta1, beta2 = group["betas"]
    scaled = g / state["s"].sqrt().clamp(min=group["eps"])
    if group["clip_exponent"] is not None:
        bound = (state["t"] - 1) ** group["clip_exponent"]
        scaled = scaled.clamp(-bound, bound)
    state["v"] = beta1 * state.get("v", 0.0) + (1 - beta1) * scaled
    state["s"] = beta2 * state["s"] + (1 - beta2) * g**2
    return state["v"]


def _muon(group: Group, state: State, g: Tensor) -> Tensor:
    """Of the SVD u s v of the momentum, divided by its norm, only s changes."""
    momentum = group["momentum"]
    state["v"] = momentum * state.get("v", 0.0) + (1 - momentum) * g
    ahead = (1 - momentum) * g + momentum * state["v"] if group["nesterov"] else state["v"]
    if not g.numel():
        return g
    a, b, c = 3.4445, -4.7750, 2.0315
    matrices = ahead if ahead.ndim == 3 else ahead.reshape(1, len(ahead), -1)
    directions = []
    for matrix in matrices:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / max(length(matrix), group["eps"])
        for _ in range(group["ns_steps"]):
            s = a * s + b * s**3 + c * s**5
        directions.append(max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5 * (u * s) @ v)
    return torch.stack(directions).view(g.shape)


def _adafactor(group: Group, state: State, x: Tensor, g: Tensor) -> Tensor:
    """The direction, whose rate is relative to the weights."""
    t, (least, least_size) = state["t"], group["eps"]
    least = 2.0**-52 if least is None else least
    beta2 = 1 - t ** group["beta2_decay"]
    if g.ndim < 2:
        state["s"] = variance = beta2 * state.get("s", 0.0) + (1 - beta2) * g**2
    else:
        rows = state["rows"] = beta2 * state.get("rows", 0.0) + (1 - beta2) * _mean(g**2, -1)
        columns = state["columns"] = beta2 * state.get("columns", 0.0) + (1 - beta2) * _mean(g**2, -2)
        variance = rows * columns / _mean(rows, -2).clamp(min=least)
    u = g / variance.sqrt().clamp(min=least)
    relative = min(1.0, t**-0.5 / group["lr"]) if group["lr"] else 1.0
    return relative * max(least_size, _rms(x)) / max(1.0, _rms(u) / group["d"]) * u


def _mean(t: Tensor, dim: int) -> Tensor:
    return t.sum(dim, keepdim=True) / max(1, t.shape[dim])


def _rms(t: Tensor) -> float:
    return length(t) / math.sqrt(max(1, t.numel()))


_DIRECTIONS: dict[str, Callable[[Group, State, Tensor], Tensor]] = {
    "Adagrad": _adagrad,
    "RMSprop": _rmsprop,
    "Adam": _adam,
    "AdamW": _adam,
    "LAMB": _adam,
    "Lion": _lion,
    "AdEMAMix": _ademamix,
    "ADOPT": _adopt,
    "Muon": _muon,
}


def _averaged(kind: str, group: Group, state: State, y: Tensor, g: Tensor) -> Tensor:
    """y after a step of z, and of the average of all z so far."""
    lr, t = group["lr"], state["t"]
    beta = group["momentum"] if kind == "SGDScheduleFree" else group["betas"][0]
    u = g
    if kind == "AdamWScheduleFree":
        beta2 = group["betas"][1]
        state["s"] = beta2 * state.get("s", 0.0) + (1 - beta2) * g**2
        u = g / ((state["s"] / (1 - beta2**t)).sqrt() + group["eps"])
    z, average = state.get("z", y), state.get("average", y)
    weight = t ** group["r"] * lr ** group["weight_lr_power"]
    state["weights"] = state.get("weights", 0.0) + weight
    share = weight / state["weights"] if state["weights"] else 0.0
    state["z"] = z = z - lr * (u + group["weight_decay"] * y)
    state["average"] = average = (1 - share) * average + share * z
    return (1 - beta) * z + beta * average


def adapted(
    kind: str, every: list[tuple[Group, State, Tensor, Tensor]], first: Group, shared: dict[str, float]
) -> list[Tensor]:
    """The parameters after one step of a rule that estimates d from all of them.

    every: options, state, value and gradient of each parameter with a gradient. first: the options that all have in
    common. shared: d and its numerator r, which are updated.
    """
    if kind == "DAdaptSGD":
        return _adapted_sgd(every, first, shared)
    (beta1, beta2), lr, d = first["betas"], first["lr"], shared.setdefault("d", first["d0"])
    beta3 = math.sqrt(beta2)
    after, inner, norm = [], 0.0, 0.0
    for group, state, x, g in every:
        g = -g if group.get("maximize") else g
        start, before = state.setdefault("start", x), state.get("sum", torch.zeros_like(x))
        if kind == "Prodigy":
            scaled, power = d * g, d * d
            inner += power * float((g * (start - x)).sum())
        else:
            scaled, power = d * g, d
        squared = scaled if kind == "Prodigy" else g
        state["v"] = beta1 * state.get("v", 0.0) + (1 - beta1) * scaled
        state["s"] = beta2 * state.get("s", 0.0) + (1 - beta2) * squared**2
        scale = state["s"].sqrt() + group["eps"] * (d if kind == "Prodigy" else 1.0)
        if kind == "DAdaptAdam":
            inner += d * float((g * before / scale).sum())
        state["sum"] = beta3 * before + (1 - beta3) * lr * power * g
        norm += float(state["sum"].abs().sum())
        u = state["v"] / scale * (d if kind == "Prodigy" else 1.0)
        after.append(x - lr * (u + d * group["weight_decay"] * x))
    shared["r"] = beta3 * shared.get("r", 0.0) + (1 - beta3) * lr * inner
    if norm:
        found = first["d_coef"] * shared["r"] / norm / (1.0 if kind == "Prodigy" else 1 - beta3)
        shared["d"] = max(d, found)
    return after


def _adapted_sgd(
    every: list[tuple[Group, State, Tensor, Tensor]], first: Group, shared: dict[str, float]
) -> list[Tensor]:
    momentum, lr, d = first["momentum"], first["lr"], shared.setdefault("d", first["d0"])
    grads = [(-g if group.get("maximize") else g) + group["weight_decay"] * x for group, _, x, g in every]
    shared["norm"] = norm = shared.get("norm", 0.0) or math.sqrt(sum(length(g) ** 2 for g in grads))
    after, size = [], 0.0
    for (_, state, x, _), g in zip(every, grads):
        before = state.get("sum", torch.zeros_like(x))
        shared["r"] = shared.get("r", 0.0) + lr * d * float((g * before).sum())
        state["sum"] = before + lr * d * g
        size += length(state["sum"]) ** 2
        state["v"] = momentum * state.get("v", 0.0) + (1 - momentum) * (d / norm * g if norm else 0.0 * g)
        after.append(x - lr * state["v"])
    if size:
        shared["d"] = max(d, first["d_coef"] * 2 * shared["r"] / (norm * math.sqrt(size)))
    return after


def length(t: Tensor) -> float:
    return math.sqrt(float(t.square().sum()))


def _bounded(ratio: float, group: Group) -> float:
    bounds = group.get("trust_clip")
    return ratio if bounds is None else min(max(ratio, bounds[0]), bounds[1])


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if top > 0 and bottom > 0 else 1.0
