"""A copy of a run in host memory, to which it can roll back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distopt.layout import local, unwrap_optimizer


class Stateful(Protocol):
    """What else a run consists of: a schedule, a loss scaler."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class HostCopy:
    """This rank's shards of a model's weights and buffers and of an optimizer's state, in host memory.

    As many bytes as they have on the device; under ZeRO-1, where every rank has all weights, all of them. No
    collective: every rank copies and restores its own. Learning rates and other options of param groups are restored
    too, random number generators are not.

    Args:
        step: The number of steps done.
        model: The model.
        optimizer: Its optimizer, or SAM around it, whose state exists.
        others: What else is restored by its `state_dict`.
    """

    def __init__(self, step: int, model: nn.Module, optimizer: Any, others: Sequence[Stateful]) -> None:
        self.step, self._model, self._optimizer, self._others = step, model, optimizer, others
        self._copies = [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]
        groups = unwrap_optimizer(optimizer).param_groups
        self._options = [{name: _copied(value) for name, value in g.items() if name != "params"} for g in groups]
        self._states = [copy.deepcopy(other.state_dict()) for other in others]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back, in place and bit for bit."""
        for tensor, kept in zip(self._tensors(), self._copies, strict=True):
            tensor.copy_(kept)
        for group, options in zip(unwrap_optimizer(self._optimizer).param_groups, self._options):
            group.update({name: _copied(value) for name, value in options.items()})
        for other, state in zip(self._others, self._states):
            other.load_state_dict(copy.deepcopy(state))

    def _tensors(self) -> Iterator[Tensor]:
        state = unwrap_optimizer(self._optimizer).state
        tensors: Iterable[Any] = [*self._model.parameters(), *self._model.buffers()]
        values = [value for p in self._model.parameters() if p in state for value in state[p].values()]
        for tensor in [*tensors, *(value for value in values if isinstance(value, Tensor))]:
            yield local(tensor.detach())


class Rollback:
    """Puts a run back: to the last copy in host memory, or to what `reload` restores.

    Args:
        model: The model.
        optimizer: Its optimizer, or SAM around it.
        others: What else is restored.
        every: The number of steps between copies.
        most: The number of times that a run may be put back.
        reload: Restores a checkpoint and returns its step, or None if there is none; instead of copies.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        others: Sequence[Stateful],
        every: int,
        most: int,
        reload: Callable[[], int | None] | None,
    ) -> None:
        self._model, self._optimizer, self._others = model, optimizer, others
        self._every, self._most, self._reload = every, most, reload
        self._times = 0
        self._copy: HostCopy | None = None

    def keep(self, done: int) -> None:
        """Makes a copy if it is due; called in good health, before a step, with the number of steps done."""
        if self._reload is not None or (self._copy is not None and done - self._copy.step < self._every):
            return
        self._optimizer.init_state()  # or zeros that a first step makes would have no copy
        self._copy = HostCopy(done, self._model, self._optimizer, self._others)

    def go_back(self, step: int) -> int | None:
        """Puts the run back.

        Returns:
            The number of steps that are done then; None if there is nothing to go back to.

        Raises:
            ValueError: After too many times.
        """
        self._times += 1
        if self._times > self._most:
            raise ValueError(
                f"step {step}: an alarm again, after {self._most} rollbacks: lower the learning rate, raise threshold "
                "or max_rollbacks, or look at the data of these steps"
            )
        if self._reload is not None:
            return self._reload()
        if self._copy is None:
            return None
        self._copy.restore()
        return self._copy.step


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)
