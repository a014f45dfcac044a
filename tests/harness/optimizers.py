"""THE TABLE: every optimizer, once. A row added here is tested against its oracle, on every layout and world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distopt import (
    ADOPT,
    LAMB,
    LARS,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamWScheduleFree,
    AdEMAMix,
    DAdaptAdam,
    DAdaptSGD,
    Lion,
    Muon,
    Prodigy,
    RMSprop,
    SGDScheduleFree,
    ShardedOptimizer,
)
from distopt.kernels.rules import Rule
from distopt.optim.adaptation import DistanceAdapted
from distopt.optim.averaging import ScheduleFree
from tests.harness import oracles


@dataclass(frozen=True)
class Row:
    """An optimizer with its arguments, the rule as the paper writes it, and the class of torch with the same arguments.

    oracle: a rule of `tests.harness.oracles`; it gets `lr` and `weight_decay` (and `trust_ratio`, if the optimizer has
    it on)
        for each tensor, so that they are not among its arguments here.
    peer: None where torch has no such optimizer.
    may_trust: whether the rule may have a trust ratio.
    """

    name: str
    cls: type[ShardedOptimizer]
    kwargs: dict[str, Any]
    oracle: Callable[..., list[list[Tensor]]]
    peer: type[torch.optim.Optimizer] | None = None
    may_trust: bool = True

    def make(self, params: Any, **kwargs: Any) -> ShardedOptimizer:
        return self.cls(self._with_rules([*params]), **self.kwargs | kwargs)

    def make_peer(self, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
        assert self.peer is not None
        return self.peer(params, **self.kwargs | kwargs)

    @property
    def compiled(self) -> bool:
        """Whether the rule has kernels."""
        optimizer = self.make([torch.zeros(1, 1)])
        (group,) = optimizer.param_groups
        return bool(optimizer.rule(group).kernel) and not (group["cautious"] or group["cautious_decay"])

    @property
    def counts(self) -> list[str]:
        """The names of the state that is a number, and on the host: step, and running sums."""
        optimizer = self.make([torch.zeros(1)])
        return ["step", *optimizer.rule(optimizer.param_groups[0]).sums]

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The names of the state of a parameter of this full shape."""
        optimizer = self.make([torch.zeros(shape)])
        return [*self.counts, *optimizer.rule(optimizer.param_groups[0]).names(shape)]

    @property
    def per_layer(self) -> bool:
        """Whether it needs state of each layer, so that it is refused where flat partitions cut layers anywhere."""
        return self.cls is Adafactor

    @property
    def coupled(self) -> bool:
        """Whether all layers have a number in common, so that no layer steps by itself, and lr is the same for all."""
        return issubclass(self.cls, DistanceAdapted)

    @property
    def trusts(self) -> bool:
        return self.make([torch.zeros(1)]).defaults["trust_ratio"]

    @property
    def slower(self) -> float:
        """The factor of the rate of the second group."""
        return 1.0 if self.coupled else 0.5

    def _with_rules(self, params: list[Any]) -> list[Any]:
        """Param groups where vectors have a rule of their own; others as they are."""
        if self.cls is not Muon or not all(isinstance(p, Tensor) for p in params):
            return params
        groups = [{**group, "params": [*group["params"]]} for group in self.groups(params)]
        return [{key: group[key] for key in group.keys() & {"params", "rule"}} for group in groups if group["params"]]

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Two param groups, as trainings have them: matrices decay, the others do not and have a rate of their own."""
        others: dict[str, Any] = {"weight_decay": 0.0, "trust_ratio": False}
        others |= {} if self.coupled else {"lr": self.slower * self.kwargs["lr"]}
        others |= {"rule": "adamw"} if self.cls is Muon else {}
        shapes = {p: getattr(p, "ds_shape", p.shape) for p in params}  # DeepSpeed's zero.Init leaves them empty
        return [
            {"params": [p for p in params if len(shapes[p]) > 1]},
            {"params": [p for p in params if len(shapes[p]) <= 1], **others},
        ]

    def expected(self, params: list[Tensor], grad: oracles.Grad, steps: int) -> list[list[Tensor]]:
        """The parameters after each step, by the oracle, in `groups`."""
        matrix = [p.ndim > 1 for p in params]
        options: dict[str, Any] = {
            "lr": [self.kwargs["lr"] * (1.0 if m else self.slower) for m in matrix],
            "weight_decay": [self.kwargs["weight_decay"] if m else 0.0 for m in matrix],
        }
        if self.trusts:
            options["trust_ratio"] = matrix
        return self.oracle(params, grad, steps, **options)


def _row(
    name: str,
    cls: type[ShardedOptimizer],
    kwargs: dict[str, Any],
    oracle: Callable[..., list[list[Tensor]]],
    peer: type[torch.optim.Optimizer] | None = None,
    **renamed: str,
) -> Row:
    """A row whose oracle takes the optimizer's own arguments, but for those that it has by another name."""
    shared = {renamed.get(k, k): v for k, v in kwargs.items() if k not in ("lr", "weight_decay", "trust_ratio")}
    return Row(
        name,
        cls,
        kwargs,
        partial(oracle, **shared),
        peer,
        not issubclass(cls, (ScheduleFree, DistanceAdapted, Adafactor, Muon)),
    )


_MOMENTS = {"betas": (0.8, 0.95), "weight_decay": 0.1}
_SGD, _RMS = torch.optim.SGD, torch.optim.RMSprop

ROWS = (
    _row("sgd", SGD, dict(lr=0.05, weight_decay=0.1), oracles.sgd, _SGD),
    _row("momentum", SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1), oracles.heavy_ball, _SGD),
    _row(
        "averaged_momentum",
        SGD,
        dict(lr=0.05, momentum=0.9, dampening=0.9, weight_decay=0.1),
        oracles.averaged_momentum,
        _SGD,
        momentum="beta",
    ),
    Row(
        "nesterov",
        SGD,
        dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        partial(oracles.nesterov, momentum=0.9),
        _SGD,
    ),
    _row("sgd_trust_ratio", SGD, dict(lr=0.05, weight_decay=0.1, trust_ratio=True), oracles.trusted_sgd),
    _row(
        "adagrad",
        Adagrad,
        dict(lr=0.1, lr_decay=0.05, initial_accumulator_value=0.1, weight_decay=0.1),
        oracles.adagrad,
        torch.optim.Adagrad,
    ),
    _row("rmsprop", RMSprop, dict(lr=0.01, alpha=0.9, weight_decay=0.1), oracles.rmsprop, _RMS),
    _row(
        "rmsprop_centered_momentum",
        RMSprop,
        dict(lr=0.005, alpha=0.9, momentum=0.8, centered=True, weight_decay=0.1),
        oracles.rmsprop,
        _RMS,
    ),
    _row("adam", Adam, dict(lr=0.05, **_MOMENTS), oracles.adam, torch.optim.Adam),
    _row("adamw", AdamW, dict(lr=0.05, **_MOMENTS), oracles.adamw, torch.optim.AdamW),
    _row("lamb", LAMB, dict(lr=0.05, **_MOMENTS), oracles.lamb),
    _row("lamb_trust_clip", LAMB, dict(lr=0.05, trust_clip=(0.25, 0.4), **_MOMENTS), oracles.lamb),
    _row("lars", LARS, dict(lr=0.1, momentum=0.9, trust_coefficient=0.5, weight_decay=0.1), oracles.lars),
    _row(
        "lars_trust_clip",
        LARS,
        dict(lr=0.1, momentum=0.9, trust_coefficient=0.5, trust_clip=(0.05, 0.25), weight_decay=0.1),
        oracles.lars,
    ),
    _row("lion", Lion, dict(lr=0.3, **_MOMENTS), oracles.lion),
    _row(
        "ademamix",
        AdEMAMix,
        dict(lr=0.05, beta3=0.98, slow_weight=3.0, slow_warmup=12, **_MOMENTS),
        oracles.ademamix,
        slow_weight="alpha",
        slow_warmup="warmup",
    ),
    _row("adopt", ADOPT, dict(lr=0.05, **_MOMENTS), oracles.adopt),
    # 1 / sqrt(step) is below lr from the fifth step on; some updates are clipped.
    _row(
        "adafactor",
        Adafactor,
        dict(lr=0.5, eps=(1e-4, 1e-2), d=1.05, weight_decay=0.1),
        oracles.adafactor,
        torch.optim.Adafactor,
    ),
    # Each iteration multiplies small singular values, and their rounding, by 3.4: three show as much as five.
    Row(
        "muon",
        Muon,
        dict(lr=0.05, momentum=0.8, ns_steps=3, betas=(0.8, 0.95), ns_dtype="float32", weight_decay=0.1),
        partial(oracles.muon, momentum=0.8, ns_steps=3, betas=(0.8, 0.95)),
        may_trust=False,
    ),
    _row(
        "cautious_adamw",
        AdamW,
        dict(lr=0.4, cautious=True, cautious_decay=True, **_MOMENTS),
        oracles.cautious_adamw,
    ),
    _row("cautious_lamb", LAMB, dict(lr=0.4, eps=1e-6, cautious=True, **_MOMENTS), oracles.cautious_adamw),
    _row(
        "sgd_schedule_free",
        SGDScheduleFree,
        dict(lr=0.2, momentum=0.8, r=0.5, weight_decay=0.1),
        oracles.sgd_schedule_free,
        momentum="beta",
    ),
    _row(
        "adamw_schedule_free",
        AdamWScheduleFree,
        dict(lr=0.1, **_MOMENTS),
        oracles.adamw_schedule_free,
    ),
    _row("dadapt_adam", DAdaptAdam, dict(lr=0.8, d0=0.02, d_coef=1.5, **_MOMENTS), oracles.dadapt_adam),
    _row(
        "dadapt_sgd",
        DAdaptSGD,
        dict(lr=0.8, momentum=0.9, d0=0.5, d_coef=1.5, weight_decay=0.1),
        oracles.dadapt_sgd,
    ),
    _row("prodigy", Prodigy, dict(lr=0.8, d0=0.02, d_coef=1.5, **_MOMENTS), oracles.prodigy),
)


def _narrow(name: str, bits: int) -> Row:
    row = next(row for row in ROWS if row.name == name)
    return replace(row, name=f"{name}_{bits}_bits", kwargs=row.kwargs | {"state_bits": bits})


# Rules with moments, in fewer bits. Not among ROWS, whose parameters have no rows long enough for a block: where these
# do, rounding differs wherever gradients do in their last bit, so that these are compared given equal gradients.
_ROUNDED = (
    *("momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lamb", "lars", "lion", "ademamix", "adopt"),
    *("muon", "adamw_schedule_free"),
)
NARROW = tuple(_narrow(name, bits) for name in _ROUNDED for bits in (16, 8, 4))

# The hyper-parameters that users have (but lr, lest 20 steps move nothing), and edges. Not all that is asked of ROWS is
# asked of them, which would take long: they are compared with their oracles, and two are rows of the matrix.
_DEFAULT = dict(lr=0.05, weight_decay=0.0)
EDGES = (
    _row("sgd_defaults", SGD, _DEFAULT, oracles.sgd, _SGD),
    _row("adagrad_defaults", Adagrad, dict(lr=0.1, weight_decay=0.0), oracles.adagrad, torch.optim.Adagrad),
    _row("rmsprop_defaults", RMSprop, dict(lr=1e-2, weight_decay=0.0), oracles.rmsprop, _RMS),
    _row("rmsprop_alpha_0.999", RMSprop, dict(lr=1e-2, alpha=0.999, weight_decay=0.0), oracles.rmsprop, _RMS),
    _row("adam_defaults", Adam, _DEFAULT, oracles.adam, torch.optim.Adam),
    _row("adam_beta2_0.9999", Adam, dict(betas=(0.9, 0.9999), **_DEFAULT), oracles.adam, torch.optim.Adam),
    _row("adamw_defaults", AdamW, dict(lr=0.05, weight_decay=0.01), oracles.adamw, torch.optim.AdamW),
    _row(
        "adamw_beta1_0", AdamW, dict(lr=0.05, betas=(0.0, 0.999), weight_decay=0.01), oracles.adamw, torch.optim.AdamW
    ),
    _row("lamb_defaults", LAMB, dict(lr=0.05, weight_decay=0.01), oracles.lamb),
    _row("lars_defaults", LARS, dict(lr=0.1, weight_decay=0.0), oracles.lars),
    _row("lion_defaults", Lion, dict(lr=0.3, weight_decay=0.0), oracles.lion),
    _row("ademamix_defaults", AdEMAMix, _DEFAULT, oracles.ademamix),
    _row("adopt_defaults", ADOPT, _DEFAULT, oracles.adopt),
    # torch's divides by the number of elements of an empty parameter; `tests.test_adafactor` compares with it.
    _row("adafactor_defaults", Adafactor, dict(lr=0.05, weight_decay=0.0), oracles.adafactor),
    Row(
        "muon_match_rms",
        Muon,
        dict(lr=0.05, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw", ns_dtype="float32", weight_decay=0.0),
        partial(oracles.muon, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
        may_trust=False,
    ),
    _row(
        "cautious_decay_lamb",
        LAMB,
        dict(lr=0.05, eps=1e-6, cautious_decay=True, weight_decay=0.1),
        oracles.cautious_adamw,
    ),
    _row("adopt_without_clipping", ADOPT, dict(clip_exponent=None, **_DEFAULT), oracles.adopt),
    _row("dadapt_adam_defaults", DAdaptAdam, dict(lr=1.0, weight_decay=0.0), oracles.dadapt_adam),
    _row("dadapt_sgd_defaults", DAdaptSGD, dict(lr=1.0, d0=0.1, weight_decay=0.0), oracles.dadapt_sgd),
    # From d0 = 1e-6 the first p0 - p is a few roundings of float32; in float64 that is in `tests.test_adaptation`.
    _row("prodigy_defaults", Prodigy, dict(lr=1.0, d0=1e-2, weight_decay=0.0), oracles.prodigy),
    _row("sgd_schedule_free_defaults", SGDScheduleFree, dict(lr=0.2, weight_decay=0.0), oracles.sgd_schedule_free),
    _row(
        "adamw_schedule_free_defaults", AdamWScheduleFree, dict(lr=0.05, weight_decay=0.0), oracles.adamw_schedule_free
    ),
)


def compiled_rules() -> dict[str, Rule]:
    """The specification of every kernel, by its name."""
    optimizers = [row.make([torch.zeros(1)]) for row in ROWS + EDGES]
    optimizers += [RMSprop([torch.zeros(1)], centered=c, momentum=m) for c in (False, True) for m in (0.0, 0.9)]
    found = [optimizer.rule(optimizer.param_groups[0]) for optimizer in optimizers]
    return {rule.kernel: rule for rule in found if rule.kernel}


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
COMPILED = [row for row in ROWS if row.compiled]
every_compiled_row = pytest.mark.parametrize("row", COMPILED, ids=lambda row: row.name)
every_separate = pytest.mark.parametrize("row", [row for row in ROWS if not row.coupled], ids=lambda row: row.name)
every_peer = pytest.mark.parametrize("row", [row for row in ROWS if row.peer], ids=lambda row: row.name)


def named(name: str) -> Row:
    return next(row for row in ROWS + EDGES + NARROW if row.name == name)


def pull(params: list[Tensor], step: int) -> Tensor:
    """A loss whose gradient depends on the parameters (on each other's too) and on the step.

    Each tensor is pulled to a target of size 1 to 3 with a sign that alternates within it, so that from the parameters
    of `initial` gradients start far from zero: Adam's first direction is their sign, which rounding must not turn.
    """
    loss = 0.5 * 0.1 * sum(p.sum() / max(1, p.numel()) for p in params) ** 2
    for i, p in enumerate(params):
        loss = loss + 0.5 * (p - target(p, i, step)).square().sum()
    return loss


def target(p: Tensor, i: int, step: int) -> Tensor:
    index = torch.arange(p.numel(), dtype=p.dtype)
    return ((1.0 - 2.0 * (index % 2)) * (2.0 + torch.sin(index + i + 3.0 * step))).view(p.shape)


def initial(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters between -0.5 and 0.5."""
    numbers = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=numbers, dtype=torch.float64).sub_(0.5).to(dtype) for shape in shapes]


@torch.no_grad()
def distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor, in the 2-norm; nan counts as infinite."""
    assert [a.shape for a in ours] == [b.shape for b in expected]
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)) for a, b in zip(ours, expected)
    ]
    return max(torch.tensor(errors).nan_to_num(nan=torch.inf).tolist(), default=0.0)
