"""The two passes of a SAM step, for every loop that runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from distopt.rng import RandomState, same_random_numbers

if TYPE_CHECKING:
    from distopt.sam.base import SAM

T = TypeVar("T")


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a step, over all of its micro-batches.

    Attributes:
        second: Whether this pass repeats the micro-batches of the step at the perturbed weights. Only then must it
            clear the gradients first.
        exchange: Whether the ranks average the gradient, which the first pass of `scope="local"` omits.
    """

    second: bool
    exchange: bool


def two_passes(
    sam: SAM,
    run_pass: Callable[[Pass], T],
    start: RandomState,
    *,
    perturbed: Callable[[], AbstractContextManager[object]] | None = None,
    complete: Callable[[], bool] = lambda: True,
) -> T:
    """Runs the passes of a step, which leaves in the gradients those that SAM steps with.

    1. The first pass computes the gradient at the weights.
    2. `perturb` moves the weights.
    3. The second pass computes the gradient there, with the random numbers of the first.
    4. `restore` brings back the weights and the buffers of the model.

    A step that does not ascend has no second pass. MomentumSAM, which needs no gradient to perturb, runs its only pass
    at the perturbed weights. If a pass raises, the weights are restored.

    Args:
        sam: The SAM.
        run_pass: Computes gradients and returns the loss. The second pass has to clear the gradients, and to run over
            the same micro-batches as the first.
        start: The state of the random number generators before the first pass.
        perturbed: Makes a context manager that perturbs on entry and restores on exit; `sam.perturbed` if None.
        complete: Whether the gradient is complete, asked after the first pass. If not (micro-batches are missing, or a
            closure computed nothing), the weights are not perturbed.

    Returns:
        What `run_pass` returned for the first pass that ran.
    """
    if perturbed is None:
        perturbed = sam.perturbed
    try:
        if not sam.needs_ascent_gradient:
            with perturbed():
                return run_pass(Pass(second=False, exchange=True))
        loss = run_pass(Pass(second=False, exchange=sam.scope == "global" or not sam.ascends))
        if complete():
            with perturbed():
                if sam.ascends:
                    with same_random_numbers(start):
                        run_pass(Pass(second=True, exchange=True))
        return loss
    except BaseException:
        sam.abort_pass()
        raise
