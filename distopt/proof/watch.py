"""The schedule of proofs: at the first step on several processes, and as often as `prove_every` says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distopt.bounds import PROVE_EVERY
from distopt.layout import unwrap_optimizer
from distopt.proof.healing import Drift, heal
from distopt.proof.messages import NoGradients, prove


@dataclass
class Watch:
    """Counts the steps of an optimizer on several processes, and proves when it is due.

    Attributes:
        model: As for `prove`.
        steps: The number of steps between two proofs; None: only the first step; 0: never.
        state: As for `prove`.
        gradients: As for `prove`.
        group: As for `prove`.
        heal: As for `prove_every`.
        taken: The number of steps so far.
    """

    model: nn.Module | None = None
    steps: int | None = None
    state: bool = False
    gradients: bool = True
    group: dist.ProcessGroup | None = None
    heal: Callable[[str], object] | None = None
    taken: int = 0

    def before_step(self, optimizer: torch.optim.Optimizer, gradients: bool = True) -> None:
        """Proves if it is due; called before each step, and with its gradients if `gradients` are to be included."""
        if self.steps == 0 or (self.taken and self.steps is None) or not _several() or not _begins(optimizer):
            return
        if self.taken % (self.steps or 1) == 0:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return  # impossible in a CUDA graph; the next step outside of one proves
            asked = self.gradients and gradients
            try:
                self._prove(optimizer, asked)
            except NoGradients as error:  # the step changes nothing, as in torch; the next one proves
                warnings.warn(str(error), UserWarning, stacklevel=2)
                return
        self.taken += 1

    def _prove(self, optimizer: torch.optim.Optimizer, gradients: bool) -> None:
        """Proves; heals replicas that have drifted apart, if it is to, and proves that they are healed."""
        try:
            prove(optimizer, self.model, state=self.state, gradients=gradients, group=self.group)
        except Drift as drift:
            healed = None if self.heal is None else heal(optimizer, drift, self.group)
            if self.heal is None or healed is None:
                raise
            prove(optimizer, self.model, state=self.state, gradients=gradients, group=self.group)
            self.heal(healed)


def before_step(optimizer: torch.optim.Optimizer) -> None:
    """Proves if it is due: `ShardedOptimizer.step` starts with this."""
    # Neither in a state dict nor in a copy of the optimizer, which has its own.
    watch = optimizer.__dict__.get("_watch") or optimizer.__dict__.setdefault("_watch", Watch())
    watch.before_step(optimizer)


def prove_every(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    steps: int | None = 100,
    *,
    state: bool = False,
    gradients: bool = True,
    group: dist.ProcessGroup | None = None,
    heal: Callable[[str], object] | None = None,
) -> None:
    """Makes an optimizer call `prove` before its next step, and then before every `steps`-th step.

    By default, optimizers of distopt prove at their first step on more than one process. Every rank must call this with
    the same arguments.

    Args:
        optimizer: Any torch optimizer, also inside `SAM` or Accelerate's wrapper.
        model: As for `prove`.
        steps: The number of steps between two proofs. None: only the next step. 0: never, not even at the first step.
        state: As for `prove`.
        gradients: As for `prove`. They are left out for a torch optimizer that is given a closure.
        group: The ranks that train together; None for all.
        heal: None: a difference is an error. Otherwise replicas whose weights or state have drifted apart are healed
            from the majority, if there is one, which takes three of them; it is called on every rank with a line that
            says what was healed. DeepSpeed's partitions are not healed.

    Raises:
        ValueError: If `steps` is neither None nor an integer >= 0.
    """
    PROVE_EVERY.check("steps", steps, "null is only the next step, 0 is never")
    optimizer = unwrap_optimizer(optimizer)
    told = optimizer.__dict__.get("_watch")
    optimizer.__dict__["_watch"] = Watch(model, steps, state, gradients, group, heal)
    if not hasattr(optimizer, "layout") and told is None:
        optimizer.register_step_pre_hook(_torch_step)


def _torch_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    closure = kwargs.get("closure", args[0] if args else None)
    optimizer.__dict__["_watch"].before_step(optimizer, gradients=closure is None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _begins(optimizer: Any) -> bool:
    """Whether a call of `step` is the first of a step: DeepSpeed calls it once for each partition."""
    layout = optimizer.__dict__.get("_bound")
    return layout is None or layout.begins_step(p for group in optimizer.param_groups for p in group["params"])
