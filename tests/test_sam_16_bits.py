"""SAM on weights of 16 bits."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import Tensor

import distopt
from distopt import SAM
from distopt.sam.rounding import perturb_
from tests.harness.sam_steps import flat, leaves, steps


def of_16_bits(dtype: torch.dtype, rho: float, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Parameters of that dtype, gradients, and the perturbation that is meant, flat, in float64."""
    numbers = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=numbers).to(dtype).requires_grad_() for size in ((300, 40), (77,))]
    grads = [(torch.randn(p.shape, generator=numbers) * scale).to(dtype) for p in params]
    meant = torch.cat([g.double().flatten() for g in grads])
    return params, grads, meant * (rho / float(meant.norm()))


@pytest.mark.parametrize(
    ("how", "rho", "warns"),
    [
        ("bfloat16 on a grid", 0.02, True),  # float32 weights that bfloat16 has, as one loads them
        ("bfloat16 on a grid", 30.0, False),
        ("compute in bfloat16", 0.02, True),
        ("compute in bfloat16", 0.3, False),  # noise, at a cosine of 0.6: the mean is right
        ("float16 weights", 0.002, True),
        ("float16 weights", 3.0, False),
    ],
)
def test_rounding_is_measured_and_told_once(how: str, rho: float, warns: bool) -> None:
    """Length, share and cosine are those that are measured here, of the same perturbation."""
    params, grads, meant = of_16_bits(torch.float16 if "weights" in how else torch.float32, rho)
    low = torch.float16 if "weights" in how else torch.bfloat16
    with torch.no_grad():
        for p in params:
            p.copy_(p.to(low) if "grid" in how else p)
    sam = SAM(distopt.SGD(params), rho)
    if low == torch.bfloat16:
        sam.compute_dtype = low
    moved = flat((p + e.view_as(p).to(p.dtype)).to(low) for p, e in zip(params, meant.split([12000, 77])))
    seen = moved - flat(p.to(low) for p in params)
    share, cosine = seen @ meant / meant.square().sum(), seen @ meant / (seen.norm() * meant.norm()).clamp(min=1e-30)
    assert bool(share < 0.9 or cosine < 0.4) == warns
    for step in range(3):
        for p, g in zip(params, grads):
            p.grad = torch.zeros_like(g) if step == 0 else g.clone()  # nothing to be measured by at first
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sam.perturb()
            sam.restore()
        assert len(told) == (warns and step == 1)
        for warning in told:
            assert warning.category is UserWarning
            text = str(warning.message)
            assert "lost in rounding" in text and "raise rho, or compute in float32" in text
            assert float(re.search(r"cosine of ([\d.]+) ", text)[1]) == pytest.approx(float(cosine), abs=0.006)
            assert float(re.search(r"sees ([\d]+)%", text)[1]) == pytest.approx(100 * float(share), abs=0.6)
            assert float(re.search(r"length ([\d.e-]+) ", text)[1]) == pytest.approx(float(seen.norm()), rel=1e-2)


@pytest.mark.parametrize("rho", [0.002, 0.02, 0.3, 30.0])
def test_bfloat16_weights_move_by_what_is_meant_in_the_mean(rho: float) -> None:
    """Rounded to the nearest, nothing is left of a small perturbation. 12,077 elements, so that noise shows little."""
    params, grads, meant = of_16_bits(torch.bfloat16, rho)
    before = flat(params)
    nearest = flat((p + e.view_as(p).bfloat16()) for p, e in zip(params, meant.split([12000, 77]))) - before
    sam = SAM(distopt.SGD(params), rho)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.002 the noise is a hundred times what is meant
        for _ in range(2):  # the same each time
            for p, g in zip(params, grads):
                p.grad = g.clone()
            sam.perturb()
            seen = flat(params) - before
            sam.restore()
    share = [float(moves @ meant / meant.square().sum()) for moves in (seen, nearest)]
    noise = float((seen - meant).norm() / meant.norm()) / math.sqrt(len(meant))  # how far a share strays by chance
    assert share[0] == pytest.approx(1.0, abs=3 * noise + 0.005)
    assert noise < 1.0
    if rho <= 0.02:
        assert share[1] < 0.2
    # No element moves by more than to a neighbour of where it should be.
    unit = torch.maximum(before.abs(), (before + meant).abs()) * 2.0**-7
    assert ((seen - meant).abs() <= unit).all()


def test_what_has_no_gradient_stays_and_what_is_not_finite_spreads_in_bfloat16() -> None:
    """The bits of a nan, all set, would turn over into those of a zero."""
    weights = torch.tensor([1.0, -3.0, 0.0, 2.0, 5.0, 7.0]).bfloat16()
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    direction = torch.tensor([0.0, 0.0, 0.0, math.inf, nan, -math.inf])
    perturb_([weights], [direction], [torch.tensor(0.5, dtype=torch.float64)])
    assert weights[:3].tolist() == [1.0, -3.0, 0.0]
    assert weights[3] == math.inf and weights[4].isnan() and weights[5] == -math.inf


def test_the_slopes_of_functional_sam_are_not_lost_in_float16() -> None:
    """A mean over many tokens has slopes below 6e-8, the least that float16 has; a loss scale comes after them."""
    tokens, params = 2**25, [torch.ones(3, requires_grad=True)]
    sam = distopt.FunctionalSAM(distopt.SGD(params), precondition=False)
    for _ in range(2):
        sam.zero_grad()
        loss = sam.loss(params[0].half(), lambda logits: logits.float().square().sum() / tokens)
        (loss * 2.0**20).backward()
        assert params[0].grad.tolist() == pytest.approx([2.0**21 / tokens] * 3, rel=1e-2)
        sam.restore() if sam._perturbation else sam.perturb()


def test_float32_is_not_warned_about() -> None:
    params = leaves(torch.float32)
    sam = SAM(distopt.SGD(params), 1e-6)
    steps(sam, params, 0, 1)  # warnings are errors


def test_inner_products_of_16_bits_are_not_rounded_to_16_bits() -> None:
    """torch's dot of bfloat16 has 8 bits; GSAM and LookSAM stepped with those."""
    a, b = (torch.rand(50_001, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    layout = distopt.layout.infer_layout([a])
    (product,) = layout.dots([0], ([a], [b]))
    assert product.item() == pytest.approx((a.double() @ b.double()).item(), rel=1e-6)
