"""Steps of SAM by a closure and by its verbs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distopt import SAM
from tests.harness.optimizers import initial, pull

RHO = 0.4
STEPS = 6  # moments, their bias corrections and ratios are all there after a few


def closure_of(opt: torch.optim.Optimizer, params: list[Tensor], step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = pull(params, step)
        loss.backward()
        return loss

    return closure


def by_closure(sam: SAM, params: list[Tensor], step: int) -> Tensor:
    return sam.step(closure_of(sam, params, step))


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [*initial((), (7,), (5, 3), (4, 6), dtype=dtype), torch.zeros(4, 3, dtype=dtype)]
    return [t.requires_grad_() for t in [*tensors, initial((3, 4), dtype=dtype)[0].t()]]
