"""The configurations that torch tests its optimizers with, for those of ours that have a peer there.

They are those of `torch.testing._internal.common_optimizers.optim_db` (torch 2.13), on the CPU and on a GPU, and
`test_torch_suite.py` compares them with it. Each is one of ours too, or is refused by the sentence that stands here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from distopt import SGD, Adagrad, Adam, AdamW, RMSprop, ShardedOptimizer

LR = torch.tensor(0.001)
DECAY = {"weight_decay": 0.1}
_ADAM: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.01},
    DECAY,
    {**DECAY, "maximize": True},
    {**DECAY, "amsgrad": True},
    {"capturable": True},
    {**DECAY, "amsgrad": True, "capturable": True},
    {"lr": LR, "amsgrad": True, "capturable": True},
    {"lr": LR, "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])), "amsgrad": True, "capturable": True},
    {"lr": LR, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "amsgrad": False, "capturable": True},
)
_CENTERED = {**DECAY, "centered": True}
CONFIGS: dict[type[ShardedOptimizer], tuple[dict[str, Any], ...]] = {
    SGD: (
        {},
        {"lr": 0.01},
        {"lr": LR},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {**DECAY, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, **DECAY},
        {"momentum": 0.9, "nesterov": True, **DECAY},
    ),
    Adagrad: (
        {},
        DECAY,
        {**DECAY, "maximize": True},
        {"lr": 0.1},
        {"initial_accumulator_value": 0.1, **DECAY},
        {"lr": 0.1, "lr_decay": 0.5, **DECAY},
        {"lr": LR},
    ),
    RMSprop: (
        {},
        {"lr": 0.001},
        DECAY,
        {"maximize": True},
        _CENTERED,
        {"maximize": True, **DECAY},
        {**_CENTERED, "momentum": 0.1},
        {**_CENTERED, "momentum": 0.1, "maximize": True},
        {"capturable": True},
        {**DECAY, "maximize": True, "capturable": True},
        {"lr": LR, "capturable": True},
    ),
    Adam: _ADAM,
    AdamW: _ADAM,
}
# torch's optimizers take one of these at a time, and test every configuration with each.
WAYS: tuple[dict[str, Any], ...] = ({}, {"foreach": True}, {"fused": True}, {"differentiable": True})


@dataclass(frozen=True)
class Config:
    """A class of ours with arguments of torch's."""

    cls: type[ShardedOptimizer]
    kwargs: dict[str, Any]

    @property
    def peer(self) -> type[torch.optim.Optimizer]:
        return getattr(torch.optim, self.cls.__name__)

    @property
    def refused(self) -> str | None:
        """What the constructor says to it."""
        if self.kwargs.get("differentiable"):
            return "differentiable=True: no gradient flows through a step of distopt: give False, or use torch.optim"
        if self.kwargs.get("amsgrad"):
            return "amsgrad=True: distopt keeps no maximum of the second moment: give False, or use torch.optim"
        if isinstance(self.kwargs.get("betas", (0.9,))[0], torch.Tensor):
            return r"betas must be two numbers in \[0, 1\), got \(tensor"
        return None

    @property
    def refused_on_the_cpu(self) -> bool:
        return bool(self.kwargs.get("capturable"))

    @property
    def up(self) -> bool:
        return bool(self.kwargs.get("maximize"))

    def make(self, params: Any, **kwargs: Any) -> ShardedOptimizer:
        return self.cls(params, **copy.deepcopy(self.kwargs) | kwargs)

    def make_peer(self, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
        own = {name: value for name, value in self.kwargs.items() if self.cls is not RMSprop or name != "fused"}
        return self.peer(params, **copy.deepcopy(own) | kwargs)

    def __str__(self) -> str:
        return "-".join([self.cls.__name__, *(f"{name}={value}" for name, value in self.kwargs.items())])


ALL = [Config(cls, {**kwargs, **way}) for cls, found in CONFIGS.items() for kwargs in found for way in WAYS]
TAKEN = [config for config in ALL if not config.refused and not config.refused_on_the_cpu]
every_config = pytest.mark.parametrize("config", ALL, ids=str)
every_way = pytest.mark.parametrize("config", TAKEN, ids=str)
every_taken = pytest.mark.parametrize(
    "config", [c for c in TAKEN if not {"foreach", "fused"} & c.kwargs.keys()], ids=str
)
