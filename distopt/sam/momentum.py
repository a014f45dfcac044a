"""Momentum-SAM: perturbs along the momentum, and needs no second pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distopt.layout import ShardLayout, fit
from distopt.sam.base import SAM
from distopt.sam.moments import FIRST, moment_of, state_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distopt.sam.rho_schedule import RhoOptions


class MomentumSAM(SAM):
    r"""Momentum-SAM: computes the gradient at weights moved against the momentum; one pass per step.

        p' = p - rho * v / |v|          v is the optimizer's momentum; |v| over all parameters and ranks
        g at p'; back to p; one step of the optimizer with g

    The paper keeps the weights at p' between steps; here they are moved before the pass and restored after it, so that
    evaluation and checkpoints see p:

        sam.perturb(); loss.backward(); sam.restore(); sam.step()

    Before its first step a parameter has no momentum, and does not move. Under ZeRO-1 each rank moves the rows that it
    owns and sends them to the others.

    Args:
        optimizer: As for `SAM`.
        interval: As for `SAM`.
        rho: The radius; in the paper's code 0.3 for SGD and 1 for AdamW.

    Raises:
        ValueError: If the optimizer has no momentum (SGD with momentum, Adam, AdamW, LAMB and LARS have it): on
            construction or, around an optimizer that is neither distopt's nor torch's, at the second step.

    Reference: Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, 2024,
    arXiv 2401.12033.
    """

    needs_ascent_gradient = False
    reads_optimizer_state = True

    def __init__(
        self, optimizer: torch.optim.Optimizer, rho: float = 0.3, *, interval: int = 1, **schedule: Unpack[RhoOptions]
    ) -> None:
        super().__init__(optimizer, rho, interval=interval, **schedule)
        names = state_names(optimizer)
        if names and all(each.isdisjoint(FIRST) for each in names):
            raise self._no_momentum()

    def perturbed_params(self) -> list[Tensor]:
        params = [p for group in self.param_groups if self.radius(group) > 0.0 for p in group["params"]]
        found = [p for p in params if p.requires_grad and self._momentum(p) is not None]
        if self._has_stepped and params and not found and not any(self._momentum(p) is not None for p in self.state):
            raise self._no_momentum()
        return found

    def _no_momentum(self) -> ValueError:
        return ValueError(f"{type(self.optimizer).__name__} has no momentum to perturb along: give it some, or use SAM")

    def _momentum(self, param: Tensor) -> Tensor | None:
        return moment_of(self.state.get(param, {}), FIRST, param)

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        stored = [fit(layout, p, self._momentum(p), "momentum") for p in params]  # type: ignore[arg-type]
        momenta = [shard for p, momentum in zip(params, stored) for shard in layout.split(p, momentum)]
        return list(torch._foreach_neg(momenta)) if momenta else [], momenta
