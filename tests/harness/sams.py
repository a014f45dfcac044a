"""THE TABLE of SAM's family: a row added here is tested against its oracle, on every layout, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from distopt import ASAM, AWP, GSAM, SAM, FriendlySAM, FunctionalSAM, LookSAM, MomentumSAM, PreconditionedSAM
from tests.harness import oracles, oracles_sam
from tests.harness.optimizers import Row, named
from tests.harness.oracles import Each, Grad

RHO, RHO_OTHERS = 0.4, 0.3  # of matrices, and of the others: `Member.groups`
_BETAS = (0.8, 0.95)  # of the rows adamw and lamb
_BASES = ("momentum", "adamw", "lamb")
_ADAMS = ("adamw", "lamb")


@dataclass(frozen=True)
class Task:
    """A loss of parameters and step, as oracles take it: of the model's outputs, which functional SAM has to see."""

    outputs: oracles_sam.Outputs
    criterion: oracles_sam.Criterion

    @property
    def grad(self) -> Grad:
        return oracles.gradient_of(lambda params, step: self.criterion(self.outputs(params, step), step))


@dataclass(frozen=True)
class Member:
    """One of the family with its arguments, and its oracle.

    oracle: the gradient function that an optimizer steps with, of a task, of rho for each tensor, and of the base.
    bases: the rows of `tests.harness.optimizers` that have the state it needs.
    reduces: the all-reduces of each step of a cycle, by mesh axis that shards.
    """

    name: str
    cls: type[SAM]
    kwargs: dict[str, Any]
    oracle: Callable[[Task, Each, Row, list[bool]], Grad]
    bases: tuple[str, ...] = _BASES
    reduces: tuple[int, ...] = (1,)

    def make(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> SAM:
        return self.cls(optimizer, **{"rho": RHO} | self.kwargs | kwargs)

    def groups(self, row: Row, params: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Those of the row; the second with a rho of its own."""
        matrices, others = row.groups(params)
        return [matrices, others | {"sam_rho": RHO_OTHERS}]

    def expected(self, row: Row, params: list[torch.Tensor], task: Task, steps: int) -> list[list[torch.Tensor]]:
        """The parameters after each step, by the oracles, in `groups`."""
        matrix = [p.ndim > 1 for p in params]
        return row.expected(params, self.oracle(task, [RHO if m else RHO_OTHERS for m in matrix], row, matrix), steps)


def _momentum_sam(interval: int) -> Callable[[Task, Each, Row, list[bool]], Grad]:
    def oracle(task: Task, rho: Each, row: Row, matrix: list[bool]) -> Grad:
        if row.name == "momentum":
            decay, weight = row.kwargs["momentum"], 1.0
            l2 = [row.kwargs["weight_decay"] if m else 0.0 for m in matrix]
        else:  # decoupled from the moments
            decay, weight, l2 = _BETAS[0], 1 - _BETAS[0], 0.0
        return oracles_sam.momentum_sam(task.grad, rho, interval, decay=decay, weight=weight, weight_decay=l2)

    return oracle


MEMBERS = (
    Member("SAM", SAM, {}, lambda task, rho, *_: oracles_sam.sam(task.grad, rho)),
    Member(
        "SAM every 3",
        SAM,
        {"interval": 3},
        lambda task, rho, *_: oracles_sam.every(3, task.grad, oracles_sam.sam(task.grad, rho)),
        reduces=(1, 0, 0),
    ),
    Member("ASAM", ASAM, {"eta": 0.02}, lambda task, rho, *_: oracles_sam.asam(task.grad, rho, 0.02)),
    Member("AWP", AWP, {}, lambda task, rho, *_: oracles_sam.awp(task.grad, rho), reduces=(2,)),
    Member("GSAM", GSAM, {"alpha": 0.6}, lambda task, rho, *_: oracles_sam.gsam(task.grad, rho, 0.6), reduces=(2,)),
    Member(
        "FriendlySAM",
        FriendlySAM,
        {"sigma": 0.8, "decay": 0.7},
        lambda task, rho, *_: oracles_sam.friendly_sam(task.grad, rho, 0.8, 0.7),
    ),
    Member(
        "LookSAM",
        LookSAM,
        {"interval": 3, "alpha": 0.5},
        lambda task, rho, *_: oracles_sam.look_sam(task.grad, rho, 3, 0.5),
        reduces=(2, 1, 1),
    ),
    Member("MomentumSAM", MomentumSAM, {}, _momentum_sam(1)),
    Member("MomentumSAM every 2", MomentumSAM, {"interval": 2}, _momentum_sam(2), reduces=(1, 0)),
    Member(
        "PreconditionedSAM",
        PreconditionedSAM,
        {"eps": 1e-2},
        lambda task, rho, *_: oracles_sam.preconditioned_sam(task.grad, rho, _BETAS[1], 1e-2),
        _ADAMS,
    ),
    Member(
        "FunctionalSAM",
        FunctionalSAM,
        {"precondition": False},
        lambda task, rho, *_: oracles_sam.functional_sam(task.outputs, task.criterion, rho),
    ),
    Member(
        "FunctionalSAM, preconditioned",
        FunctionalSAM,
        {"eps": 1e-2},
        lambda task, rho, *_: oracles_sam.functional_preconditioned_sam(
            task.outputs, task.criterion, rho, _BETAS[1], 1e-2
        ),
        _ADAMS,
    ),
)
EVERYONE = [(member, named(base)) for member in MEMBERS for base in member.bases]

every_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
everyone = pytest.mark.parametrize(("member", "row"), EVERYONE, ids=lambda value: value.name)
