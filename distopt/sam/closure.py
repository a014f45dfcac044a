"""The passes of `SAM.step(closure)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from distopt.rng import random_state
from distopt.sam.gradient_watch import GradientWatch
from distopt.sam.two_passes import Pass, two_passes

if TYPE_CHECKING:
    from distopt.sam.base import SAM


def run_closure(sam: SAM, closure: Callable[[], Any]) -> tuple[Any, bool]:
    """Calls a closure once per pass of the step.

    Args:
        sam: The SAM.
        closure: Clears the gradients, runs forward and backward over all micro-batches, and returns the loss.

    Returns:
        The result of the first call, and whether the closure computed anything. One that did not is called once.

    Raises:
        ValueError: If the closure adds to existing gradients instead of clearing them.
    """
    params = [p for group in sam.param_groups for p in group["params"]]
    computed = True

    def run_pass(this: Pass) -> Any:
        nonlocal computed
        if this.second:
            sam.zero_grad()
            with torch.enable_grad():
                return closure()
        with GradientWatch(params) as watch, torch.enable_grad():
            loss = closure()
        if watch.added and sam.ascends:
            raise ValueError(
                "step(closure): the closure adds to gradients that were there before it, and SAM's second pass, "
                "which calls it again, would lack them: let it clear them and run all micro-batches of the step, "
                "or use perturb() and restore() (in Lightning accumulate_grad_batches=1, or manual optimization)"
            )
        computed = watch.changed or not (watch.found or loss is None)
        return loss

    start = random_state(*dict.fromkeys(p.device for p in params))
    loss = two_passes(sam, run_pass, start, complete=lambda: computed)
    return loss, computed
