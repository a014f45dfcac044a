"""SAM and param groups: a radius of each, an empty one, and what `rho` means."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from distopt import SAM
from tests.harness import oracles_sam
from tests.harness.optimizers import distance, initial
from tests.harness.oracles import gradient_of
from tests.harness.sam_problems import LR, RHO, SHAPES, squared

NORMS_ONLY = [0.0, RHO, 0.0, 0.0, RHO]


@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (SAM, lambda grad: oracles_sam.sam(grad, NORMS_ONLY)),
        (partial(distopt.ASAM, eta=0.02), lambda grad: oracles_sam.asam(grad, NORMS_ONLY, 0.02)),
        (partial(distopt.GSAM, alpha=0.6), lambda grad: oracles_sam.gsam(grad, NORMS_ONLY, 0.6)),
        (partial(distopt.LookSAM, interval=2), lambda grad: oracles_sam.look_sam(grad, NORMS_ONLY, 2, 0.7)),
        (distopt.MomentumSAM, lambda grad: oracles_sam.momentum_sam(grad, NORMS_ONLY, decay=0.9, weight=1.0)),
    ],
    ids=["SAM", "ASAM", "GSAM", "LookSAM", "MomentumSAM"],
)
def test_sam_rho_0_leaves_a_group_out_of_the_perturbation_and_of_its_norm(make: Any, oracle: Any) -> None:
    """SAM-ON (arXiv 2306.04226) perturbs the norm layers alone; a rho of 0 was refused. All are stepped."""
    params = [p.requires_grad_() for p in initial(*SHAPES)]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "sam_rho": 0.0},
        {"params": [p for p in params if p.ndim < 2]},
    ]
    sam = make(torch.optim.SGD(groups, lr=LR, momentum=0.9), RHO)

    def loss(params: list[Tensor], step: int) -> Tensor:
        return sum(torch.sin(p + i).square().mean() for i, p in enumerate(params)) * (1.0 + params[0].mean().square())

    def closure() -> Tensor:
        sam.zero_grad()
        value = loss(params, step)
        value.backward()
        return value

    grad = oracle(gradient_of(loss))
    expected, momenta = initial(*SHAPES), [torch.zeros_like(p) for p in initial(*SHAPES)]
    for step in range(5):
        momenta = [0.9 * m + g for m, g in zip(momenta, grad(expected, step))]
        expected = [p - LR * m for p, m in zip(expected, momenta)]
        sam.step(closure)
        assert distance([p.detach() for p in params], expected) < 1e-12, step


def test_adadeltas_rho_is_adadeltas() -> None:
    """It was taken for the radius: 0.9 where 0.05 was asked for."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    sam = SAM(torch.optim.Adadelta([p], rho=0.9), rho=0.05)
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    sam.perturb()
    assert p.tolist() == pytest.approx([0.03, 0.04])
    sam.restore()
    sam.param_groups[0]["sam_rho"] = 0.5
    sam.perturb()
    assert p.tolist() == pytest.approx([0.3, 0.4])


def test_the_first_group_may_be_empty_and_the_count_of_steps_outlives_it() -> None:
    """An IndexError; and the count of `interval` was in the first group alone, which may be replaced."""
    p = torch.ones(2, requires_grad=True)
    sam = SAM(distopt.SGD([{"params": []}, {"params": [p]}], lr=0.1), interval=3)
    seen = []
    for step in range(6):
        if step == 4:
            sam.param_groups = sam.param_groups[1:]
            sam.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
        seen.append(sam.ascends)
        sam.step(partial(squared, sam, p))
    assert seen == [True, False, False, True, False, False]
    assert [group["sam_steps"] for group in sam.param_groups] == [6, 6]


def test_arguments_after_rho_have_names() -> None:
    """The third had six meanings in the family."""
    for kind in (SAM, distopt.ASAM, distopt.GSAM, distopt.LookSAM, distopt.FriendlySAM, distopt.FunctionalSAM):
        with pytest.raises(TypeError, match="positional argument"):
            kind(distopt.AdamW([torch.ones(1)]), 0.1, 1)
    for kind in (distopt.PreconditionedSAM, distopt.MomentumSAM):
        with pytest.raises(TypeError, match="positional argument"):
            kind(distopt.AdamW([torch.ones(1)]), 0.1, 1)
