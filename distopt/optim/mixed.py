"""Several rules in one optimizer: a param group names its rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from distopt.kernels import dispatch
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.kernels.update import Update
from distopt.layout import ShardLayout
from distopt.optim.adam import AdamW
from distopt.optim.base import ShardedOptimizer
from distopt.optim.lion import Lion

# The rules of other optimizers that a param group may have.
RULES: Mapping[str, Callable[[Any], ShardedOptimizer]] = {"adamw": AdamW, "lion": Lion}


class MixedOptimizer(ShardedOptimizer):
    """An optimizer whose param groups may have the rule of another one: `rule="adamw"` or `rule="lion"`.

    One optimizer for schedules, clipping, checkpoints and engines. A group has the options of its own rule: those that
    it does not set are this optimizer's, and where the name has another sense in its rule (`renamed`), that rule's
    default.

    Attributes:
        own: The name of the optimizer's own rule.
        renamed: The options of the optimizer that are none of other rules, though these have options of that name.
    """

    own: str
    renamed: tuple[str, ...] = ()

    def own_rule(self, group: dict[str, Any]) -> Rule:
        """As `rule`, for a group with the optimizer's own rule."""
        raise NotImplementedError

    def own_updates(self, layout: ShardLayout, shards: Shards) -> list[Update]:
        """Returns the updates of a group with the optimizer's own rule."""
        return dispatch.updates(self.directions, shards, self.ratio_of)

    def rule(self, group: dict[str, Any]) -> Rule:
        other = self._other(group)
        return self.own_rule(group) if other is None else other.rule(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = param_group.get("rule", self.defaults["rule"])
        self._check_rule(name)
        if name != self.own:
            defaults = _of_rule(name).defaults
            own = {key: defaults[key] for key in defaults if key in self.renamed or key not in self.defaults}
            param_group = {**own, **param_group}
        super().add_param_group(param_group)

    def check(self, group: dict[str, Any]) -> None:
        self._check_rule(group["rule"])
        if group["capturable"]:
            raise ValueError(
                f"capturable=True: the rule {self.own!r} has no kernel that a CUDA graph could capture: give False"
            )

    def _check_rule(self, name: object) -> None:
        if name != self.own and name not in RULES:
            raise ValueError(f"rule must be one of {', '.join((self.own, *RULES))}, got {name!r}")

    def _other(self, group: dict[str, Any]) -> ShardedOptimizer | None:
        """Returns an optimizer of the group's rule, which has no parameters of this one; None for the own rule."""
        return None if group["rule"] == self.own else _of_rule(group["rule"])

    def _updates(self, layout: ShardLayout, shards: list[Shards]) -> list[Update]:
        found: list[Update] = []
        for each in shards:
            other = self._other(each.group)
            if other is None:
                found += self.own_updates(layout, each)
            else:
                found += dispatch.updates(other.directions, each, other.ratio_of)
        return found


def split_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the options of `param_groups` with which an optimizer's own rule gets the parameters that it is for."""
    return {"matrices": optimizer.own} if isinstance(optimizer, MixedOptimizer) else {}


@lru_cache
def _of_rule(name: str) -> ShardedOptimizer:
    return RULES[name]([torch.zeros(1)])
