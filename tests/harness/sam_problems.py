"""Small problems for SAM's two passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt import SAM

RHO, LR = 0.3, 0.1
SHAPES = ((5, 3), (4,), (3, 4), (2, 2), (3,))


def squared(sam: SAM, p: Tensor) -> Tensor:
    sam.zero_grad()
    loss = p.square().sum()
    loss.backward()
    return loss


class Regression:
    """A model, its data, and one of the family around AdamW."""

    def __init__(self, kind: Callable[..., SAM], **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x = nn.Linear(8, 1).double(), torch.randn(64, 8, dtype=torch.float64)
        self.sam = kind(distopt.AdamW(self.model.parameters(), lr=0.01), rho=0.1, **options)

    def loss(self, i: int = 0) -> Tensor:
        return self.sam.loss((self.model(self.x.roll(i, 0)[:16]).sin() - 1), lambda y: y.square().mean())

    def closure(self) -> Tensor:
        self.sam.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    @property
    def end(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


FAMILY = (
    SAM,
    distopt.ASAM,
    distopt.AWP,
    distopt.GSAM,
    distopt.LookSAM,
    distopt.FriendlySAM,
    distopt.MomentumSAM,
    distopt.PreconditionedSAM,
    distopt.FunctionalSAM,
)
every_kind = pytest.mark.parametrize("kind", FAMILY)
