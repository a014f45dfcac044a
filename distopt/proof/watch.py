"""When an optimizer proves: at its first step on several processes, and as often as `prove_every` says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distopt.layout import unwrap_optimizer
from distopt.proof.messages import NoGradients, prove


@dataclass
class Watch:
    """Counts the steps of an optimizer on several processes, and proves where it is time.

    steps: between two proofs; None: the first step alone; 0: never.
    """

    model: nn.Module | None = None
    steps: int | None = None
    state: bool = False
    gradients: bool = True
    group: dist.ProcessGroup | None = None
    taken: int = 0

    def before_step(self, optimizer: torch.optim.Optimizer, gradients: bool = True) -> None:
        """To be called before each step, with the gradients that it takes if `gradients` are to be asked."""
        if self.steps == 0 or (self.taken and self.steps is None) or not _several() or not _begins(optimizer):
            return
        if self.taken % (self.steps or 1) == 0:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return  # a graph cannot ask; the next step that is none does
            asked = self.gradients and gradients
            try:
                prove(optimizer, self.model, state=self.state, gradients=asked, group=self.group)
            except NoGradients as error:  # nothing moves, as in torch; the next step asks again
                warnings.warn(str(error), UserWarning, stacklevel=2)
                return
        self.taken += 1


def before_step(optimizer: torch.optim.Optimizer) -> None:
    """What `ShardedOptimizer.step` begins with."""
    # Not in a state dict, nor in a copy of the optimizer, which proves by itself.
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
) -> None:
    """Has an optimizer call `prove` before its next step, and then before each `steps`-th.

    Optimizers of distopt prove at their first step on more than one process without being told. All ranks have to be
    told alike.

    Args:
        optimizer: Any torch optimizer, also inside `SAM` or Accelerate's wrapper.
        model: As for `prove`.
        steps: How many steps from one proof to the next. None: only the next one. 0: never, also not at the first.
        state: As for `prove`.
        gradients: As for `prove`. Of a torch optimizer that gets a closure they are not asked.
        group: The ranks that train together; None for all.

    Raises:
        ValueError: `steps` is neither None nor an integer >= 0.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise ValueError(f"steps must be None (only the next), 0 (never) or an integer >= 1, got {steps!r}")
    optimizer = unwrap_optimizer(optimizer)
    told = optimizer.__dict__.get("_watch")
    optimizer.__dict__["_watch"] = Watch(model, steps, state, gradients, group)
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
