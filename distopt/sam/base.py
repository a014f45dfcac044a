"""Sharpness-aware minimization: a step with the gradient at the worst point near the weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt.optim.clip import Clip, refuse_closure, step_clipped
from distopt.optim.eager import eager_island
from distopt.optim.observer import vetoed
from distopt.sam.checks import check_inner
from distopt.sam.closure import run_closure
from distopt.sam.perturbing import PerturbingOptimizer, Scope

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class SAM(PerturbingOptimizer):
    r"""Sharpness-aware minimization (SAM) around any torch optimizer.

        perturb:  p <- p + rho * g / |g|     the norm is over all parameters and ranks; g is the gradient at p
        restore:  p <- p, as it was          g is now the gradient at the perturbed point
        step:     one step of the optimizer with that gradient

    There are two ways to use it:

        loss.backward(); sam.perturb(); sam.zero_grad(); second_loss.backward(); sam.restore(); sam.step()
        loss = sam.step(closure)     # the closure clears the gradients, runs forward and backward, returns the loss

    With gradient accumulation both passes run over the same micro-batches, so a closure has to run all of them.
    `step(closure)` gives both passes the same random numbers (dropout) of torch, NumPy and Python. Clip after
    `restore`, which leaves the second gradient. Everything else is the optimizer's (`param_groups`, `state`,
    `state_dict`, hooks), so that schedules, clipping and checkpoints see one optimizer.

    The weights are restored from a copy, bit for bit. The copy is sharded like the weights: under DDP and ZeRO-1 every
    rank has a full one. Where a rank's gradients are right only in the rows that it owns (ZeRO-1's reduce-scatter), it
    perturbs these rows and sends them: each pass then costs as much communication as an all-reduce of the gradients.

    A parameter without a gradient in the first pass (an expert without tokens, a dropped block) is not perturbed; one
    without a gradient in the second pass is not stepped, and its state does not change. In norms and inner products a
    missing gradient counts as 0.

    bfloat16 weights are rounded so that the perturbation is right in the mean over elements; where bfloat16 is only the
    compute dtype, the forward pass sees the perturbation of float32 weights with noise. The first `perturb` measures
    what is left of it, and warns if that is not enough (docs/sam.md).

    Args:
        optimizer: Any torch optimizer. A param group may have its own radius, `sam_rho`, >= 0. With 0 the group is
            neither perturbed nor part of the norm: `sam_rho=0.0` for all but the norm layers is SAM-ON (Mueller et al.,
            Normalization Layers Are All That Sharpness-Aware Minimization Needs, NeurIPS 2023, arXiv 2306.04226).
        rho: The radius of the neighbourhood, > 0, in units of the 2-norm of all weights.
        interval: The number of steps between two that perturb, >= 1; the others are plain steps of the optimizer. Read
            `ascends` before a second pass.
        scope: With `global` every rank perturbs along the same averaged gradient. With `local` each rank perturbs along
            its own (the m-sharpness of the paper), without communication in the first pass: run that under
            `model.no_sync()` if the step `ascends`. Only where the weights are full on every rank.
        model: The model whose buffers (the statistics of batch norm) the second pass must not change. They cannot be
            found from parameters: without it both passes of `step(closure)` change them and count two batches per step,
            without a warning. None if there are none, and where `distopt.attach`, `SAMTrainerMixin` or `distopt.train`
            runs SAM, which pass their model.
        schedule: When SAM perturbs; each is a pure function of the number of the step, from 0. `start`, the first step
            that perturbs, >= 0; `stop`, the first one that no longer does, > start, or None; `rho_schedule`, factors of
            every radius by step, {0: 0.0, 1000: 1.0}, with straight lines between them. Steps without a radius are
            plain steps of the optimizer, at the cost of one pass.

    Attributes:
        step_number: The number of the current step, where a loop counts it; None to count the steps taken.
        compute_dtype: The dtype of the forward pass where it is not that of the weights (mixed precision), or None.
            `distopt.attach`, `SAMTrainerMixin` and `distopt.train` set it.

    Raises:
        ValueError: If an argument is out of bounds; if the optimizer contains a SAM; if a param group has a `rho` that
            is not the optimizer's own (Adadelta); if a closure adds to existing gradients; if `scope="local"` meets
            sharded weights; under DeepSpeed, whose partitions `distopt.engine.DeepSpeed` perturbs.

    Warns once if a step that ascends is taken without `perturb`.

    Reference: Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
    Generalization, ICLR 2021, arXiv 2010.01412.
    """

    takes_clip = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        interval: int = 1,
        scope: Scope = "global",
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        check_inner(optimizer, SAM)
        super().__init__(optimizer, rho, interval=interval, scope=scope, model=model, **schedule)
        self._warned = False  # of a step without `perturb`
        self._has_stepped = False  # and so the optimizer has all the state that it will have

    @eager_island
    def step(
        self, closure: Callable[[], Any] | None = None, *, clip: Clip | None = None, consumes_grads: bool = False
    ) -> Any:
        """Takes one step of the optimizer, after both passes if there is a closure.

        Skips no step: if the loss is inf or nan, so are the weights, as with torch's optimizers. `distopt.train` skips
        such a step, and so does torch's GradScaler: `scaler.step(sam)`, after both passes by hand.

        Args:
            closure: Runs forward and backward over all micro-batches of a step and returns the loss; called once per
                pass. One that computes nothing, as in Lightning's manual optimization, counts as none: both passes
                were run by hand.
            clip: The gradients of the second pass, measured after `restore`, as for `distopt.ShardedOptimizer.step`.
            consumes_grads: As there; without a clip it changes nothing.

        Returns:
            The loss of the first pass, or the result of the optimizer's step without a closure.

        Raises:
            ValueError: If the closure adds to existing gradients instead of clearing them: the second pass would lack
                those. For a closure and a clip.
            RuntimeError: Between `perturb` and `restore`.
        """
        if self._perturbation is not None:
            raise RuntimeError(
                "step() was called between perturb() and restore(): the weights are perturbed, restore()"
            )
        if closure is not None:
            refuse_closure(clip)
        loss = None if closure is None else self._both_passes(closure)
        stepped = [] if vetoed(self.optimizer) else self._stepped()
        self._warn_of_no_ascent(stepped)
        result = self.optimizer.step() if clip is None else step_clipped(self.optimizer, clip, consumes_grads)
        self._state_buffers.commit(stepped)
        self._has_stepped = self._has_stepped or bool(stepped)
        self.count_step()
        return result if closure is None else loss

    def _stepped(self) -> list[Tensor]:
        """Returns the parameters that a step updates; where no state waits for it, one of them says that it does."""
        having = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        return list(having if self._state_buffers.staged else itertools.islice(having, 1))

    def _both_passes(self, closure: Callable[[], Any]) -> Any:
        by_hand = self._perturb_called
        loss, computed = run_closure(self, closure)
        if not computed:
            self._perturb_called = by_hand
        return loss

    def _warn_of_no_ascent(self, stepped: list[Tensor]) -> None:
        if stepped and not self._perturb_called and not self._warned and (self.ascends or self.always_descends):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}.step() was called without perturb() and restore(), so this is a plain step of "
                f"{type(self.optimizer).__name__}: run the passes around them, or give step a closure",
                UserWarning,
                stacklevel=3,
            )

    def count_step(self) -> None:
        """Counts a step that was taken, in every param group, so that a resumed run ascends at the same steps."""
        self._perturb_called = False
        if self._counts:
            count = self._steps() + 1
            for group in self.param_groups:
                group["sam_steps"] = count

    def init_state(self) -> None:
        """Creates the state that checkpoints contain, the optimizer's and SAM's, where it does not exist yet."""
        if hasattr(self.optimizer, "init_state"):
            self.optimizer.init_state()
        if self._counts:  # torch's checkpoints fill only keys that exist
            count = self._steps()
            for group in self.param_groups:
                group["sam_steps"] = count
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not hasattr(self.optimizer, "init_state"):  # torch's create state only for parameters that have none at all
            params = [p for p in params if self.state.get(p)]
        for name in self.buffers:
            self._state_buffers.create(self._layout(), params, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.radius(param_group)
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho}, optimizer={self.optimizer!r})"
