"""Cautious updates, two options of a param group: no step uphill, and no weight decay against the step.

    cautious           u <- u * mask / max(mean of mask over the layer, 0.001),   mask = 1 where u * g > 0, else 0
    cautious_decay     direction = u + weight_decay * p only where u * p >= 0

u is the rule's direction without its decay, g the gradient, with an L2 penalty if the rule has one. The trust ratio
multiplies what these leave. The paper on the first divides by (kept elements + 1) / elements; its authors' code, and
timm's, by the mean of at least 0.001, as here. That code takes the mean of a shard where parameters are sharded, which
is another update on every number of ranks. Here it is that of the full layer, and its sums travel with those of the
trust ratios. The paper on the second has no mask; with both, u is the masked direction, and 0 does not oppose a decay.

References: Liang et al., Cautious Optimizers: Improving Training with One Line of Code, 2024, arXiv 2411.16085.
Chen et al., Cautious Weight Decay, 2025, arXiv 2510.12402.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distopt.kernels import exact
from distopt.kernels.norms import products, squared_norms
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.kernels.update import Directions, ForeachUpdate, ratio_of_each


class HasRule(Protocol):
    """An optimizer, as far as it is needed here: `distopt.ShardedOptimizer`."""

    ratio_of: Literal["update", "gradient"]

    def rule(self, group: dict[str, Any]) -> Rule: ...


LEAST_SHARE = 1e-3  # a layer in which fewer elements agree is scaled as if so many did


class CautiousUpdate(ForeachUpdate):
    """The update whose directions are masked and rescaled, layer by layer.

    The norm of a direction depends on the mean of its mask. Both come from one exchange, by

        |m / mean + decay|^2 = |m|^2 / mean^2 + 2 m . decay / mean + |decay|^2,   m = u * mask
    """

    def step(self) -> None:
        raise AssertionError("the mean is over all ranks: squared_norms comes first")

    def squared_norms(self) -> tuple[Tensor, ...]:
        """Measures |p|^2, |m|^2, m . decay and |decay|^2 with a trust ratio, and always the elements kept, and all."""
        self._measured = [(replace(part, grads=[]), _masked(self._directions, part)) for part in self._shards.slices()]
        parts = [self._measure(part, masked) for part, masked in self._measured]
        width = 6 if self.group["trust_ratio"] else 2
        return tuple(torch.cat(column) for column in zip(*parts)) or (torch.zeros(0, exact.DIGITS),) * width

    def norms(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        kept, elements = sums[4:6] if self.group["trust_ratio"] else sums[:2]
        self._factors = elements.clamp(min=1.0) / torch.maximum(kept, LEAST_SHARE * elements).clamp(min=LEAST_SHARE)
        if not self.group["trust_ratio"]:
            return kept, elements
        weights, masked, inner, decays = sums[:4]
        return weights.sqrt(), (self._factors**2 * masked + 2.0 * self._factors * inner + decays).clamp(min=0.0).sqrt()

    def apply(self, ratios: Tensor | None) -> None:
        for part, masked in self._measured:
            decays = decay(part, masked)
            torch._foreach_mul_(masked, ratio_of_each(self._factors, part))
            if decays:
                torch._foreach_add_(masked, decays)
            factors = ratio_of_each(torch.ones_like(self._factors) if ratios is None else ratios, part)
            torch._foreach_addcmul_(part.params, masked, factors, value=-self.group["lr"])

    def _measure(self, part: Shards, masked: list[Tensor]) -> list[Tensor]:
        kept = exact.digits(torch.stack([m.count_nonzero() for m in masked]).double())
        elements = exact.digits(torch.tensor([float(m.numel()) for m in masked], dtype=torch.float64).to(kept.device))
        if not self.group["trust_ratio"]:
            return [kept, elements]
        norms = [squared_norms(part.params, part.rows), squared_norms(masked, part.rows)]
        decays = decay(part, masked)
        none = torch.zeros_like(kept)
        pair = [products(masked, decays, part.rows), squared_norms(decays, part.rows)] if decays else [none, none]
        return [*norms, *pair, kept, elements]


def with_cautious_decay(directions: Directions) -> Directions:
    """Returns a rule whose weight decay spares the elements that the direction moves away from 0.

    direction = u + weight_decay * p where u * p >= 0, else u
    """

    def spared(shards: Shards) -> list[Tensor]:
        found = directions(_undecayed(shards))
        if decays := decay(shards, found):
            torch._foreach_add_(found, decays)
        return found

    return spared


def decay(shards: Shards, directions: list[Tensor]) -> list[Tensor]:
    """Returns the decoupled weight decay of each shard; nothing if there is none."""
    rule = shards.rule
    of_step = rule.scales.get(rule.decay, lambda step: rule.scalars.get(rule.decay, 0.0))
    factors = [of_step(step) for step in shards.steps]
    if not any(factors):
        return []
    decays = list(torch._foreach_mul(shards.params, factors))
    if shards.group["cautious_decay"]:
        for d, u, p in zip(decays, directions, shards.params):
            d.masked_fill_(u.sign() * p.sign() < 0, 0.0)
    return decays


def check_cautious(optimizer: HasRule, group: dict[str, Any]) -> None:
    """Raises ValueError for a param group that asks for a cautious update which its rule does not have."""
    if not (group["cautious"] or group["cautious_decay"]):
        return
    name, rule = type(optimizer).__name__, optimizer.rule(group)
    if group["capturable"]:
        raise ValueError("capturable=True needs kernels, which cautious updates have not: give cautious=False")
    if group["cautious_decay"] and not rule.decay:
        raise ValueError(
            f"cautious_decay=True: the weight decay of {name} is not added to its direction (a Rule with decay=...): "
            "use AdamW, LAMB, Lion, AdEMAMix or ADOPT, or give False"
        )
    if group["cautious"] and group.get("weight_decay") and not (rule.decay or rule.penalty):
        raise ValueError(
            f"cautious=True: the Rule of {name} does not say where weight_decay={group['weight_decay']!r} is added: "
            "give it decay= or penalty=, the name of the scalar, or weight_decay=0"
        )
    if group["cautious"] and group["trust_ratio"] and optimizer.ratio_of == "gradient":
        raise ValueError(
            f"cautious=True: the trust ratio of {name} multiplies the gradient, before it is known which elements of "
            "the direction agree with it: give trust_ratio=False, or use LAMB"
        )


def _masked(directions: Directions, shards: Shards) -> list[Tensor]:
    """Returns the directions, without decay, times 1 where they have the sign of the gradient, and 0 elsewhere."""
    found = directions(_undecayed(shards))
    grads = shards.grads
    if penalty := shards.rule.scalars.get(shards.rule.penalty, 0.0):
        grads = list(torch._foreach_add(grads, shards.params, alpha=penalty))
    for u, g in zip(found, grads):
        u.mul_((u.sign() * g.sign()).clamp_(min=0.0))  # signs, whose product does not underflow; nan stays nan
    return found


def _undecayed(shards: Shards) -> Shards:
    rule = shards.rule
    if rule.decay in rule.scales:
        return replace(shards, rule=replace(rule, scales={**rule.scales, rule.decay: lambda step: 0.0}))
    return replace(shards, rule=replace(rule, scalars={**rule.scalars, rule.decay: 0.0})) if rule.decay else shards
