"""Members of SAM's family that divide by differences of gradients, where these are nothing but rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distopt import GSAM, SGD, FriendlySAM, LookSAM
from distopt.sam import SAM


def passes(sam: SAM, p: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """One step with these gradients in its two passes; returns the perturbation."""
    p.grad = first.clone()
    before = p.detach().double().clone()
    sam.perturb()
    moved = p.detach().double() - before
    if sam.ascends:
        p.grad = second.clone()
    sam.restore()
    return moved


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_friendly_sam_perturbs_along_a_gradient_that_does_not_change_or_not_at_all(
    dtype: torch.dtype, decay: float
) -> None:
    """d = lambda^t g but for the rounding of g, which another number of ranks changes: that was scaled up to rho."""
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 500).to(dtype))
    sam = FriendlySAM(SGD([p], lr=0.0), rho=0.5, decay=decay)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(500, generator=generator).double()
    lengths = []
    for _ in range(200):
        rounding = torch.finfo(dtype).eps * (torch.rand(500, generator=generator, dtype=torch.float64) - 0.5)
        now = (g * (1.0 + rounding)).to(dtype)
        moved = passes(sam, p, now, now)
        sam.step()
        lengths.append(moved.norm().item())
        if lengths[-1]:
            cosine = (moved @ g / (moved.norm() * g.norm())).item()
            assert cosine > 0.9  # also where weights have 16 bits
    assert lengths[-1] == 0.0
    if decay:  # without it the mean is always the gradient
        assert lengths[0] == pytest.approx(0.5, rel=0.02)
        assert passes(sam, p, -now, now).norm().item() == pytest.approx(0.5, rel=0.02)  # a gradient that does


def expected_gsam(first: Tensor, second: Tensor) -> Tensor:
    g, h = first.double(), second.double()
    along = (g @ h / (h @ h)).item() if h.norm() > 0 else 0.0
    return h - 0.4 * (g - along * h)


ORTHOGONAL = torch.tensor([0.0, 1.0])
PAIRS: dict[str, Callable[[torch.dtype], tuple[Tensor, Tensor]]] = {
    "parallel": lambda dtype: (torch.tensor([0.3, 0.7]).to(dtype), torch.tensor([0.6, 1.4]).to(dtype)),
    "opposite": lambda dtype: (torch.tensor([0.3, 0.7]).to(dtype), torch.tensor([-0.6, -1.4]).to(dtype)),
    "zero, then not": lambda dtype: (torch.zeros(2, dtype=dtype), ORTHOGONAL.to(dtype)),
    "not, then zero": lambda dtype: (ORTHOGONAL.to(dtype), torch.zeros(2, dtype=dtype)),
    "zero": lambda dtype: (torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)),
    "vanishing": lambda dtype: (ORTHOGONAL.to(dtype), torch.finfo(dtype).tiny * ORTHOGONAL.to(dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_gsam_of_parallel_and_of_zero_gradients(name: str, dtype: torch.dtype) -> None:
    """In float16 the quotient of the last pair was inf, and inf times 0 the gradient of the weight without one."""
    first, second = PAIRS[name](dtype)
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    passes(GSAM(SGD([p], lr=0.0), rho=0.05, alpha=0.4), p, first, second)
    assert p.grad is not None
    error = (p.grad.double() - expected_gsam(first, second)).norm().item()
    assert error <= 2.0 * torch.finfo(dtype).eps * (first.double().norm() + second.double().norm()).item()


def test_looksam_keeps_a_small_angle_of_16_bits() -> None:
    """v is a twentieth of the gradients, of which 1 in 256 would be lost by a quotient of 16 bits: a tenth of v."""
    generator = torch.Generator().manual_seed(0)
    g, other = (torch.randn(4000, generator=generator) for _ in range(2))
    first, second = g.bfloat16(), (0.7 * g + 0.035 * other).bfloat16()
    p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    sam = LookSAM(SGD([p], lr=0.0), rho=0.05, interval=2, alpha=0.7)
    passes(sam, p, first, second)
    sam.step()
    a, b = first.double(), second.double()
    v = b - (a @ b / (a @ a)) * a
    look = sam.state[p]["sam_look"].double()
    assert ((look - v).norm() / v.norm()).item() < 2.0**-8
    assert abs((look @ a).item()) < 2.0**-8 * math.sqrt((v @ v).item() * (a @ a).item())
