"""Functional SAM: perturbs the function of the model, not its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt.bounds import switch
from distopt.layout import ShardLayout
from distopt.sam.base import SAM
from distopt.sam.perturbation import Perturbation
from distopt.sam.preconditioned import PreconditionedSAM

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class FunctionalSAM(PreconditionedSAM):
    r"""SAM for language models whose second pass reuses the first pass's derivative of the loss by the logits.

        first pass:   u = dl/df at f(p)                        f: the model's outputs (logits), l: their loss
        perturb:      as preconditioned SAM, or as SAM
        second pass:  g = J(p + e)^T u                         J: the derivative of f by the weights

    Only the model's function is perturbed. The loss at given logits, which is what SAM minimizes in language models, is
    not. Both passes have to compute the loss by `loss`, which sees the outputs of the model:

        loss = sam.loss(model(x).logits, lambda logits: cross_entropy(logits, y)); loss.backward()

    In the second pass the value has the right gradient but is not a loss. Keeps one gradient of the logits per
    micro-batch.

    Args:
        optimizer: As for `PreconditionedSAM`.
        rho: As for `PreconditionedSAM`.
        eps: As for `PreconditionedSAM`.
        interval: As for `PreconditionedSAM`.
        model: As for `PreconditionedSAM`.
        precondition: Whether the perturbation is preconditioned, which needs an optimizer with second moments.

    Raises:
        ValueError: As for `PreconditionedSAM`, and for a `precondition` that is not a boolean.
        RuntimeError: If a pass does not call `loss`, or if the second has more or fewer outputs than the first.

    Reference: Singh, Mobahi, Agarwala, Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM,
    ICML 2025, arXiv 2502.02407.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        precondition: bool = True,
        eps: float = 1e-8,
        interval: int = 1,
        model: nn.Module | None = None,
        **schedule: Unpack[RhoOptions],
    ) -> None:
        switch().check("precondition", precondition)
        self.precondition = self.reads_optimizer_state = precondition
        super().__init__(optimizer, rho, eps=eps, interval=interval, model=model, **schedule)
        self._slopes: list[Tensor] = []
        self._in_closure = False

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return super().ascent(layout, params) if self.precondition else SAM.ascent(self, layout, params)

    def perturb(self) -> Tensor:
        if self.ascends and not self._slopes:
            raise RuntimeError("the first pass has shown no outputs: compute its loss by sam.loss(outputs, criterion)")
        return super().perturb()

    def restore(self) -> None:
        left, self._slopes = self._slopes, []
        super().restore()
        if left:
            raise RuntimeError("the second pass has shown fewer outputs than the first: compute its loss by sam.loss")

    def _put_back(self) -> Perturbation | None:
        self._slopes = []  # of a second pass that failed
        return super()._put_back()

    def loss(self, outputs: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        if outputs.dtype.itemsize < 4:  # without a loss scale their gradients underflow in float16
            outputs = outputs.float()
        if self._perturbation is None:
            loss = criterion(outputs)
            if torch.is_grad_enabled() and self.ascends:
                (slope,) = torch.autograd.grad(loss, outputs, retain_graph=True)
                self._slopes.append(slope.detach())
            return loss
        if not self._slopes:
            raise RuntimeError("the second pass has more outputs than the first: give both the same micro-batches")
        return (outputs * self._slopes.pop(0)).sum()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._perturbation is None and not self._in_closure:
            self._slopes = []  # of a step that was given up
        super().zero_grad(set_to_none)

    def _both_passes(self, closure: Callable[[], Any]) -> Any:
        self._slopes, self._in_closure = [], True  # a closure may clear between its loss and the backward pass
        try:
            return super()._both_passes(closure)
        finally:
            self._in_closure = False
