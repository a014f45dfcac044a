"""The training of a case by one process, in float64, one tensor after the other, without a line of distopt.

Written from the papers' formulas (see `tests.harness.oracles`, which it is compared with), with state that can be
looked at in the middle of a run: parameters without a gradient, groups that are added, options that change.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.harness.search.case import Case, Group, Step
from tests.harness.search.model import batch, criterion, feature, initial, joined
from tests.harness.search.rules import COUPLED, adapted, length, moved

Grads = dict[int, Tensor]  # by parameter; one without a gradient is missing
# The smallest angle between gradients that LookSAM promises to tell from their rounding.
RESOLUTION = {"float64": 3e-8, "float32": 1.1920929e-07}
_ADAM = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
_SGD = dict(lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False)
_AVERAGE = dict(r=0.0, weight_lr_power=2.0)
_ADAPTED = _ADAM | dict(lr=1.0, d0=1e-6, d_coef=1.0)
# The defaults that the documentation promises.
DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": _SGD,
    "LARS": _SGD | dict(lr=0.1, momentum=0.9, trust_coefficient=1e-3, trust_ratio=True),
    "Adagrad": dict(lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10),
    "RMSprop": dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False),
    "Adam": _ADAM,
    "AdamW": _ADAM | dict(weight_decay=1e-2),
    "LAMB": _ADAM | dict(weight_decay=1e-2, eps=1e-6, trust_ratio=True),
    "Lion": dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0),
    "AdEMAMix": _ADAM | dict(beta3=0.9999, slow_weight=2.0, slow_warmup=None),
    "ADOPT": _ADAM | dict(betas=(0.9, 0.9999), eps=1e-6, clip_exponent=0.25),
    "SGDScheduleFree": dict(lr=1.0, momentum=0.9, weight_decay=0.0, **_AVERAGE),
    "AdamWScheduleFree": _ADAM | dict(lr=2.5e-3, **_AVERAGE),
    "Prodigy": _ADAPTED,
    "DAdaptAdam": _ADAPTED,
    "DAdaptSGD": dict(lr=1.0, momentum=0.0, weight_decay=0.0, d0=1e-6, d_coef=1.0),
    "Adafactor": dict(lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0),
    "Muon": dict(lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5, eps=1e-7, betas=(0.9, 0.95)),
}
OF_RULES = {"adamw": dict(eps=1e-8)}  # what a group with another rule than the optimizer's does not take from it
SAM_DEFAULTS: dict[str, dict[str, Any]] = {
    "SAM": dict(rho=0.05),
    "ASAM": dict(rho=0.5, eta=0.01),
    "AWP": dict(rho=0.005),
    "GSAM": dict(rho=0.05, alpha=0.4),
    "FriendlySAM": dict(rho=0.05, sigma=1.0, decay=0.6),
    "LookSAM": dict(rho=0.05, interval=5, alpha=0.7),
    "MomentumSAM": dict(rho=0.3),
    "PreconditionedSAM": dict(rho=0.05, eps=1e-8),
    "FunctionalSAM": dict(rho=0.05, precondition=True, eps=1e-8),
}


class Reference:
    """The weights of a case, step by step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weights = initial(case.params)
        self.frozen = {i for i, p in enumerate(case.params) if p.frozen}
        self.groups: list[dict[str, Any]] = []
        for group in case.groups:
            self._add(group)
        self.state: dict[int, dict[str, Any]] = defaultdict(dict)
        self.shared: dict[str, float] = {}  # by all parameters
        self.sam = SAM_DEFAULTS[case.sam] | case.sam_options if case.sam else {}
        self.taken = 0
        self.norm: float | None = None  # of the last clipped gradients

    def step(self, step: Step) -> list[Tensor]:
        """The weights after it."""
        for event in step.events:
            self._event(*event)
        grads = self._sharp(step) if self.case.sam else self._grads(self.weights, step.unused)
        if self.case.max_norm is not None:
            self.norm = _norm(grads)
            grads = {i: g / max(1.0, self.norm / self.case.max_norm) for i, g in grads.items()}
        stepped = [(group, i) for group in self.groups for i in group["params"] if i in grads]
        if self.case.optimizer in COUPLED:
            every = [(group, self.state[i], self.weights[i], grads[i]) for group, i in stepped]
            after = adapted(self.case.optimizer, every, self.groups[0], self.shared)
        else:
            after = [
                moved(self.case.optimizer, group, self.state[i], self.weights[i], grads[i]) for group, i in stepped
            ]
        for (_, i), x in zip(stepped, after):
            self.weights[i] = x
        self.taken += 1
        return list(self.weights)

    def _add(self, group: Group) -> None:
        own = OF_RULES.get(group.options.get("rule", ""), {})
        self.groups.append({**DEFAULTS[self.case.optimizer], **self.case.options, **own, **group.options})
        self.groups[-1]["params"] = group.params

    def _event(self, kind: str, *args: Any) -> None:
        if kind == "set":
            group, name, value = args
            for one in self.groups if group is None else [self.groups[group]]:
                one[name] = value
        elif kind == "freeze":
            self.frozen.add(*args)
        elif kind == "thaw":
            self.frozen.remove(*args)
        elif kind == "add":
            self._add(*args)

    # Gradients

    def _used(self, unused: Sequence[int]) -> list[int]:
        return [i for i in range(len(self.case.params)) if i not in unused]

    def _outputs(self, leaves: Sequence[Tensor], used: Sequence[int]) -> Tensor:
        features = [feature(leaves[i], batch(self.taken)) for i in used for _ in range(1 + self.case.params[i].tied)]
        return joined(features)

    def _grads(self, at: Sequence[Tensor], unused: Sequence[int], slope: Tensor | None = None) -> Grads:
        """Of the optimizer's parameters. slope: the derivative by the outputs, where it is another pass's."""
        used = self._used(unused)
        ours = [i for group in self.groups for i in group["params"]]
        wanted = [i for i in used if i in ours and i not in self.frozen]
        if not wanted:
            return {}
        leaves = [w.detach().clone().requires_grad_() for w in at]
        outputs = self._outputs(leaves, used)
        loss = criterion(outputs, self.case.params, used, self.taken) if slope is None else (outputs * slope).sum()
        return dict(zip(wanted, torch.autograd.grad(loss, [leaves[i] for i in wanted])))

    def _slope(self, unused: Sequence[int]) -> Tensor:
        used = self._used(unused)
        outputs = self._outputs(self.weights, used).detach().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(outputs, self.case.params, used, self.taken), outputs)
        return slope

    # SAM's family

    def _sharp(self, step: Step) -> Grads:
        """The gradient that the optimizer steps with."""
        kind, sam = self.case.sam, self.sam
        ascends = self.taken % sam.get("interval", 1) == 0
        if kind == "MomentumSAM":
            momenta = {i: self.state[i].get("v") for group in self.groups for i in group["params"]}
            moving = {i: -v for i, v in momenta.items() if v is not None and i not in self.frozen}
            return self._grads(self._perturbed(moving, moving) if ascends else self.weights, step.unused)
        first = self._grads(self.weights, step.unused)
        if not ascends:
            return self._looked(first) if kind == "LookSAM" else first
        direction, measured = first, first
        if kind == "ASAM":
            scale = {i: _adapted(self.weights[i], sam["eta"]) for i in first}
            measured = {i: scale[i] * g for i, g in first.items()}
            direction = {i: scale[i] ** 2 * g for i, g in first.items()}
        elif kind == "AWP":
            lengths = {i: _over(length(self.weights[i]), length(g)) for i, g in first.items()}
            direction, measured = {i: lengths[i] * g for i, g in first.items()}, None
        elif kind == "FriendlySAM":
            radius = self._radius()
            new = {i: g for i, g in first.items() if radius[i]}
            means = {i: self.state[i].get("friendly", 0.0) for i in new}
            means = {i: sam["decay"] * means[i] + (1 - sam["decay"]) * g for i, g in new.items()}
            direction = measured = {i: g - sam["sigma"] * means[i] for i, g in new.items()}
        elif kind == "PreconditionedSAM" or (kind == "FunctionalSAM" and sam["precondition"]):
            direction = measured = {i: g / (self._second_moment(i).sqrt() + sam["eps"]) for i, g in first.items()}
        at = self._perturbed(direction, measured)
        slope = self._slope(step.unused) if kind == "FunctionalSAM" and first else None
        second = self._grads(at, step.second, slope)
        if kind == "FriendlySAM":  # whose mean moves with what is stepped
            for i in means.keys() & second.keys():
                self.state[i]["friendly"] = means[i]
        if kind == "GSAM":
            along = _over(_dot(first, second), _norm(second) ** 2)
            return {i: g - sam["alpha"] * (first.get(i, 0.0) - along * g) for i, g in second.items()}
        if kind == "LookSAM":
            along = _over(_dot(first, second), _norm(first) ** 2)
            look = {i: g - along * first.get(i, 0.0) for i, g in second.items()}
            parallel = _norm(look) <= RESOLUTION[self.case.dtype] * _norm(second)
            for i, v in look.items():
                self.state[i]["look"] = torch.zeros_like(v) if parallel else v
        return second

    def _looked(self, first: Grads) -> Grads:
        look = {i: self.state[i].get("look", torch.zeros_like(g)) for i, g in first.items()}
        factor = _over(self.sam["alpha"] * _norm(first), _norm(look))
        return {i: g + factor * look[i] for i, g in first.items()}

    def _perturbed(self, direction: Grads, measured: Grads | None) -> list[Tensor]:
        radius = self._radius()
        norm = 1.0 if measured is None else _norm({i: m for i, m in measured.items() if radius[i]})
        at = list(self.weights)
        for i, d in direction.items():
            at[i] = at[i] + _over(radius[i], norm) * d
        return at

    def _radius(self) -> dict[int, float]:
        return {i: group.get("sam_rho", self.sam["rho"]) for group in self.groups for i in group["params"]}

    def _second_moment(self, i: int) -> Tensor:
        (group,) = (group for group in self.groups if i in group["params"])
        start = group.get("initial_accumulator_value", 0.0)
        return self.state[i].get("s", torch.full_like(self.weights[i], start))


def _adapted(w: Tensor, eta: float) -> Tensor:
    return w.abs() + eta if w.ndim > 1 else torch.ones_like(w)


def _over(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else 0.0


def _norm(tensors: Grads) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


def _dot(a: Grads, b: Grads) -> float:
    return sum(float((a[i] * b[i]).sum()) for i in a.keys() & b.keys())
