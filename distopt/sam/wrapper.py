"""A wrapper of an optimizer that is one itself."""

from __future__ import annotations

from typing import Any

import torch


class OptimizerWrapper(torch.optim.Optimizer):
    """Looks to schedules, clipping, scalers and checkpoints like the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Optimizer.__init__ is not called: it would create param groups that schedules change without effect.
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """That of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """That of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        # Called for attributes that the wrapper lacks: defaults, layout, the dictionaries of hooks.
        if name in ("optimizer", "__deepcopy__"):  # the optimizer's own would copy it without this
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # which a schedule wraps

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
