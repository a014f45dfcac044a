"""Averages of the weights over the steps, sharded as the optimizer's state: EMA and LAWA."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.bounds.optimizer import AVERAGE
from distopt.kernels import rounding
from distopt.layout import fit, unwrap_optimizer
from distopt.optim.averaged import Averages, filled, mean, params_with
from distopt.optim.base import ShardedOptimizer


class WeightAverage:
    """An average of an optimizer's weights, each element for itself: exact on every layout, without communication.

    It belongs to the optimizer from then on, whose state has its float32 buffers (float64 for weights of that), so that
    they are sharded, saved and resumed as its moments are: on any engine and number of processes. Of 16-bit weights it
    averages the float32 values that the optimizer updates. A parameter that joins later starts from its own weights.

    Args:
        optimizer: An optimizer of distopt, also inside of SAM or Accelerate's wrapper.

    Raises:
        ValueError: For an optimizer that is not distopt's, one that has an average already (a schedule-free one has its
            own), and weights that an engine keeps to itself (DeepSpeed at stage 0 with 16-bit weights).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        inner = unwrap_optimizer(optimizer)
        name = type(self).__name__
        if not isinstance(inner, ShardedOptimizer):
            raise ValueError(
                f"{name} averages the weights of an optimizer of distopt, got {type(inner).__name__}: use one of "
                "distopt, or torch.optim.swa_utils"
            )
        if inner.average is not None:
            own = type(inner.average).__name__
            raise ValueError(f"{name} beside {own}, which averages the weights already: use one of them")
        self._optimizer = weakref.ref(inner)  # a cycle would keep its memory
        inner.average = self

    group_state: tuple[str, ...] = ()  # its entries of the param groups

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of its buffers in the optimizer's state."""
        raise NotImplementedError

    def update(self) -> None:
        """Takes the weights of now into the average; call it after each step that was applied, on every rank."""
        with torch.no_grad():
            optimizer = self._bound()
            for index, group in enumerate(optimizer.param_groups):
                self._update(index, group)

    def init_buffers(self) -> None:
        """Makes the buffers that are missing, with the weights of now. The optimizer's own `init_state` calls it."""
        with torch.no_grad():
            optimizer = self._bound()
            for index, group in enumerate(optimizer.param_groups):
                params = optimizer.layout.local_params(index, group["params"])
                for name in self.buffers:
                    self._shards(index, params, name)

    def averages(self, index: int) -> Averages:
        """Returns the parameters of a param group that have an average, and the average of each of their shards.

        None of them before the first update, since the weights are what there is then.
        """
        optimizer = self._bound()
        names = self.filled(optimizer.param_groups[index])
        if not names:
            return [], []
        params = params_with(optimizer, index, self.buffers[0])
        return params, mean([self._shards(index, params, name) for name in names])

    def filled(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the buffers whose mean is the average, by what a param group says."""
        return filled(group)

    def _update(self, index: int, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _bound(self) -> ShardedOptimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ValueError(f"the optimizer of this {type(self).__name__} no longer exists: keep it, or make another")
        layout = optimizer.layout
        if not layout.flat and not layout.gradients_visible:
            raise ValueError(
                f"{type(self).__name__} cannot reach the weights of the model, since DeepSpeed at stage 0 keeps copies "
                "of 16-bit weights to itself: use zero_optimization.stage >= 1, or float32"
            )
        return optimizer

    def _shards(self, index: int, params: Sequence[Tensor], name: str) -> list[Tensor]:
        """Returns the local shards of a buffer of parameters, made or laid out where needed."""
        optimizer = self._bound()
        layout, shards = optimizer.layout, []
        for p in params:
            state = optimizer.state[p]
            if name not in state:
                state[name] = layout.zeros(p)
                for to, value in zip(layout.split(p, state[name]), self._weights(index, [p])):
                    to.copy_(value)
            state[name] = fit(layout, p, state[name], f"{name} of a parameter of shape {tuple(p.shape)}")
            shards += layout.split(p, state[name])
        return shards

    def _weights(self, index: int, params: Sequence[Tensor]) -> list[Tensor]:
        """Returns the local shards of what the optimizer updates: the weights, or their values in float32."""
        optimizer = self._bound()
        layout, group = optimizer.layout, optimizer.param_groups[index]
        optimizer._local.settle(optimizer, layout, index, layout.local_params(index, group["params"]))
        states = [optimizer.state[p] for p in params]
        found: list[Tensor] = []
        for p, of, state in zip(params, optimizer._local.updated(layout, params, states, group), states):
            shards = [shard.detach() for shard in layout.split(p, of)]
            if (rest := state.get("remainder")) is not None:
                shards = [rounding.join(high, low) for high, low in zip(shards, layout.split(p, rest))]
            found += shards
        return found


class EMA(WeightAverage):
    r"""An exponential moving average (EMA) of the weights p of all steps, corrected for its start.

        average_t = sum_i decay^(t - i) p_i / sum_i decay^(t - i)              i = 1 .. t

    computed as  W <- decay W + 1,  average <- average + (p - average) / W. The first weights count as any others: many
    implementations start from the weights before the first step, which then have the share decay^t. With `decay = 1 -
    1/n` it averages about the last n steps. One float32 number for each parameter.

        average = distopt.EMA(optimizer, decay=0.999)
        ...
        optimizer.step()
        average.update()
        ...
        with distopt.averaged(optimizer, model):
            evaluate(model)

    Args:
        optimizer: As for `WeightAverage`.
        decay: In [0, 1); it may be another in a run that is resumed.

    Raises:
        ValueError: As `WeightAverage`, and for a decay out of its bound.

    Reference: Polyak, Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM 1992; Morales-Brotons,
    Vogels, Hendrikx, Exponential Moving Average of Weights in Deep Learning, TMLR 2024, arXiv 2411.18704.
    """

    buffers = ("ema",)
    group_state = ("ema_weight",)

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.999) -> None:
        AVERAGE["decay"].check("decay", decay)
        super().__init__(optimizer)
        self.decay = float(decay)

    def _update(self, index: int, group: dict[str, Any]) -> None:
        layout = self._bound().layout
        params = layout.local_params(index, group["params"])
        weights, average = self._weights(index, params), self._shards(index, params, "ema")
        group["ema_weight"] = self.decay * group.get("ema_weight", 0.0) + 1.0
        if not average:
            return
        if group["ema_weight"] == 1.0:
            torch._foreach_copy_(average, weights)
            return
        # Three roundings, each the same wherever an element is: a fused one differs at the end of a shard.
        change = list(torch._foreach_sub(weights, average))
        torch._foreach_mul_(change, 1.0 / group["ema_weight"])
        torch._foreach_add_(average, change)


class LAWA(WeightAverage):
    r"""The latest weight average (LAWA): the mean of the last snapshots of the weights, one at every so many steps.

        average_t = mean of p_i over the last `window` multiples i of `every`, i <= t

    Each snapshot is as many float32 numbers as there are parameters. Before the first the weights themselves are used,
    then the mean of as many as there are. A run that is resumed with another window begins anew.

    Args:
        optimizer: As for `WeightAverage`.
        window: The number of snapshots, >= 1.
        every: The steps between two of them, >= 1.

    Raises:
        ValueError: As `WeightAverage`, and for a number out of its bound.

    Reference: Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging,
    2022, arXiv 2209.14981; Sanyal et al., Early Weight Averaging Meets High Learning Rates for LLM Pre-training, 2023,
    arXiv 2306.03241.
    """

    group_state = ("lawa_snapshots", "lawa_steps", "lawa_window")

    def __init__(self, optimizer: torch.optim.Optimizer, window: int = 5, every: int = 100) -> None:
        AVERAGE["window"].check("window", window)
        AVERAGE["every"].check("every", every)
        super().__init__(optimizer)
        self.window, self.every = window, every

    @property
    def buffers(self) -> tuple[str, ...]:
        return tuple(f"lawa_{i}" for i in range(self.window))

    def filled(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return filled(group) if group.get("lawa_window") == self.window else ()

    def _update(self, index: int, group: dict[str, Any]) -> None:
        if group.get("lawa_window") != self.window:
            group |= {"lawa_window": self.window, "lawa_snapshots": 0, "lawa_steps": 0}
        group["lawa_steps"] += 1
        if group["lawa_steps"] < self.every:
            return
        params = self._bound().layout.local_params(index, group["params"])
        weights = self._weights(index, params)
        if oldest := self._shards(index, params, f"lawa_{group['lawa_snapshots'] % self.window}"):
            torch._foreach_copy_(oldest, weights)
        group |= {"lawa_snapshots": group["lawa_snapshots"] + 1, "lawa_steps": 0}
