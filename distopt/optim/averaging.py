"""What schedule-free optimizers share: the average of the iterates, and the two modes of their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels.rules import Rule
from distopt.layout import ShardLayout
from distopt.layout.tensors import Trained
from distopt.optim.averaged import Averages, params_with
from distopt.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


def averaged(
    params: list[Tensor],
    updates: list[Tensor],
    z: list[Tensor],
    *,
    lr: float,
    beta: float,
    weight: list[float],
    weight_sum: list[float],
) -> list[Tensor]:
    """Computes what is left of the step of y once it has moved towards z, and updates y and z in place.

    With x = (y - (1 - beta) z) / beta put into the formula of `AdamWScheduleFree`, the new y is

        y + c (z - y) - lr (1 - beta (1 - c)) u            c = weight / weight_sum

    so that x need not be stored. Unlike other rules it changes its parameters, and needs lr: z is not theirs.

    Args:
        params: The weights y.
        updates: The updates u, of the gradients at y.
        z: The iterates.
        lr: The learning rate.
        beta: The share of x in y.
        weight: The weight of the new z in x.
        weight_sum: The sum of the weights so far, this one included.
    """
    shares = [w / total if total else 0.0 for w, total in zip(weight, weight_sum)]
    torch._foreach_lerp_(params, z, shares)
    torch._foreach_add_(z, updates, alpha=-lr)
    return list(torch._foreach_mul(updates, [1.0 - beta * (1.0 - c) for c in shares]))


class ScheduleFree(ShardedOptimizer):
    """What schedule-free optimizers share: their weights are y while they train, and x for everything else.

    Call `train()` before training and `eval()` before evaluation and before weights are saved, on all ranks. Both are
    free where nothing changes. The mode is the entry `train_mode` of each param group: a checkpoint of weights and
    state continues in the mode in which it was saved. A step in eval mode raises ValueError.

    Trust ratios raise ValueError: the step of y is not that of z.
    """

    needs_float32 = "interpolates between its weights and others in float32"
    group_state = ("train_mode",)
    unobservable = "the weights y also move towards z, by more than the direction that is measured"

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **torch_options: Any) -> None:
        super().__init__(params, defaults | {"train_mode": True}, **torch_options)

    def beta(self, group: dict[str, Any]) -> float:
        """Returns the share of x in y."""
        raise NotImplementedError

    def train(self) -> None:
        """Makes the weights y, at which gradients are taken. Collective."""
        self._set_mode(True)

    def eval(self) -> None:
        """Makes the weights x, the average, which is what the method optimizes. Collective."""
        self._set_mode(False)

    @property
    def average(self) -> ScheduleFree:
        """Itself, for `distopt.averaged`."""
        return self

    @torch.no_grad()
    def averages(self, index: int) -> Averages:
        """Implements `distopt.optim.averaged.Average`: x while the weights are y, and nothing in eval mode."""
        group = self.param_groups[index]
        if not group["train_mode"]:
            return [], []
        params, weights, z = self._both(index)
        share = 1.0 - 1.0 / self.beta(group)  # of z: y = (1 - beta) z + beta x
        return params, list(torch._foreach_lerp(weights, z, share)) if weights else []

    def bind(self, layout: ShardLayout) -> None:
        """As in the base class.

        Raises:
            ValueError: Also where the engine updates copies of the weights, which it alone brings to the model.
        """
        if not layout.flat and not layout.gradients_visible:
            raise ValueError(
                f"{type(self).__name__}.eval() cannot reach the weights of the model, since DeepSpeed at stage 0 keeps "
                "copies of 16-bit weights to itself: use zero_optimization.stage >= 1, or float32"
            )
        super().bind(layout)

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        # At the start x = y = z.
        return layout.master(param) if name == "z" else super().init_slot(layout, group, name, param)

    def check(self, group: dict[str, Any]) -> None:
        if self.beta(group) == 0.0:
            name = "betas[0]" if "betas" in group else "momentum"
            raise ValueError(f"{name} must be > 0, got 0.0: without a share of the average x in y, y does not tell x")
        if group["trust_ratio"]:
            raise ValueError(
                f"trust_ratio=True: {type(self).__name__} has none, as the steps of z and y differ: give False, or use "
                "distopt.LAMB"
            )

    def weighted(self, group: dict[str, Any], rule: Rule) -> Rule:
        """Returns the specification of a rule, with the weights of the average."""
        lr, r, power = group["lr"], group["r"], group["weight_lr_power"]

        def weight(step: Any) -> Any:
            return step**r * lr**power

        return Rule(
            buffers=("z", *rule.buffers),
            scalars={**rule.scalars, "lr": lr, "beta": self.beta(group)},
            scales={"weight": weight},
            divisors=rule.divisors,
            squares=rule.squares,
            sums={"weight_sum": weight},
        )

    def _begin(self) -> tuple[ShardLayout, list[Trained]]:
        if not all(group["train_mode"] for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__} steps in train mode, and its weights are the average x since eval(): call "
                "optimizer.train() before the forward pass of a training step"
            )
        return super()._begin()

    @torch.no_grad()
    def _set_mode(self, training: bool) -> None:
        changing = [i for i, group in enumerate(self.param_groups) if group["train_mode"] is not training]
        if not changing:
            return
        layout, changed = self.layout, []
        for i in changing:
            beta = self.beta(self.param_groups[i])
            share = 1.0 - beta if training else 1.0 - 1.0 / beta  # of z: y = (1 - beta) z + beta x
            params, weights, z = self._both(i)
            if weights:
                torch._foreach_lerp_(weights, z, share)
            changed += params
        self._local.round_masters(self, layout, changed)
        layout.publish(changed)
        for i in changing:
            self.param_groups[i]["train_mode"] = training

    def _both(self, index: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Returns the parameters of a param group that have stepped, the shards that a step updates, and those of z."""
        layout, group = self.layout, self.param_groups[index]
        params = params_with(self, index, "z")  # before the first step there are none
        self._local.settle(self, layout, index, params)
        states = [self.state[p] for p in params]
        weights = layout.shards(params, self._local.updated(layout, params, states, group))
        return params, weights, layout.shards(params, [state["z"] for state in states])


def train_mode(optimizer: torch.optim.Optimizer) -> None:
    """Calls `train()` of an optimizer that has modes, also inside of a wrapper."""
    getattr(optimizer, "train", lambda: None)()


def eval_mode(optimizer: torch.optim.Optimizer) -> None:
    """Calls `eval()` of an optimizer that has modes, also inside of a wrapper."""
    getattr(optimizer, "eval", lambda: None)()
