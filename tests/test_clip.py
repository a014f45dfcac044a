"""Clipping by the global norm: the paper's formula, over all layers and ranks, for any torch optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from tests.harness import oracles
from tests.harness.cells import covering
from tests.harness.distributed import run
from tests.harness.optimizers import distance, initial, pull
from tests.harness.sharded import EVERYWHERE, backward, sharded, whole


def graded(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], torch.optim.Optimizer, float]:
    """Parameters with gradients but for one, an optimizer of them in two groups, and the norm of all gradients."""
    params = [p.requires_grad_() for p in initial((), (3,), (4, 5), (2, 3), dtype=dtype)]
    pull(params, 0).backward()
    params[3].grad = None
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params[:3]))
    return params, distopt.SGD([{"params": params[:1]}, {"params": params[1:]}]), norm


@pytest.mark.parametrize("ratio", [1e-6, 0.5, 0.999999, 1.000001, 3.0, 1e6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 2e-7)], ids=str)
def test_clips_as_the_paper_and_returns_the_norm(ratio: float, dtype: torch.dtype, tolerance: float) -> None:
    """One division and one product away. torch's function adds 1e-6 to the norm first."""
    params, opt, norm = graded(dtype)
    before = [p.grad.clone() for p in params[:3]]
    expected = oracles.clipped(lambda *_: [g.double() for g in before], ratio * norm)(params, 0)
    total = distopt.clip_grad_norm_(opt, ratio * norm)
    assert total.shape == ()
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(norm, rel=tolerance)
    assert distance([p.grad for p in params[:3]], expected) < tolerance
    assert params[3].grad is None
    if ratio > 1.0:
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before))


def test_inf_measures_and_does_not_clip() -> None:
    params, opt, norm = graded()
    before = [p.grad.clone() for p in params[:3]]
    assert distopt.clip_grad_norm_(opt).item() == pytest.approx(norm, rel=1e-15)
    assert distopt.clip_grad_norm_(opt, math.inf).item() == pytest.approx(norm, rel=1e-15)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before))


@pytest.mark.parametrize("zero", [False, True], ids=["gradients", "gradients that are zero"])
def test_zero_clips_to_nothing(zero: bool) -> None:
    """Gradients that were zero already became nan."""
    params, opt, _ = graded()
    for p in params[:3] if zero else ():
        p.grad.zero_()
    distopt.clip_grad_norm_(opt, 0.0)
    assert all((p.grad == 0.0).all() for p in params[:3])


@pytest.mark.parametrize("bad", [-1e-9, -math.inf, math.nan])
def test_bad_max_norms_are_refused_and_nothing_is_clipped(bad: float) -> None:
    params, opt, _ = graded()
    before = params[2].grad.clone()
    with pytest.raises(ValueError, match=rf"max_norm must be >= 0, got {bad!r}; give inf to measure"):
        distopt.clip_grad_norm_(opt, bad)
    assert torch.equal(params[2].grad, before)


def test_no_gradients_have_norm_zero() -> None:
    _, opt, _ = graded()
    opt.zero_grad()
    assert distopt.clip_grad_norm_(opt, 1.0).item() == 0.0
    assert [norm.item() for norm in distopt.grad_norms(opt).values()] == [0.0] * 4


@pytest.mark.parametrize(("value", "others"), [(math.inf, 0.0), (-math.inf, 0.0), (math.nan, math.nan)])
def test_a_norm_that_is_not_finite_spares_no_gradient(value: float, others: float) -> None:
    """Nothing that looks like a usable gradient is left, if somebody steps without looking at the norm."""
    params, opt, _ = graded()
    params[2].grad[1, 1] = value
    total = distopt.clip_grad_norm_(opt, 1.0).item()
    assert total == math.inf or (math.isnan(value) and math.isnan(total))
    assert params[2].grad[1, 1].isnan()
    params[2].grad[1, 1] = others
    for p in params[:3]:
        assert torch.equal(p.grad.nan_to_num(7.0), torch.full_like(p, others).nan_to_num(7.0))


def test_a_bfloat16_neighbour_costs_a_float32_gradient_no_accuracy() -> None:
    """The factor took the dtype of the first gradient: 8 bits for all."""
    low, high = initial((50,), (60,), dtype=torch.float32)
    low = low.bfloat16()
    for p in (low, high):
        p.requires_grad_().grad = p.detach().clone()
    total = distopt.clip_grad_norm_(distopt.SGD([low, high]), 0.7).item()
    assert total > 0.7
    assert distance([high.grad], [high * (0.7 / total)]) < 1e-7
    assert distance([low.grad], [low * (0.7 / total)]) < 2**-7


# On every layout.

OPTIMIZERS: dict[str, Any] = {
    "LAMB": distopt.LAMB,
    "torch's AdamW": torch.optim.AdamW,
    "SAM of torch's SGD": lambda params: distopt.SAM(torch.optim.SGD(params)),
}


def clip_on(kind: str, optimizer: str, max_norm: float) -> tuple[float, list[float], list[Tensor]]:
    """At a step at which two parameters have no gradient: the norm, that of each layer, the clipped gradients."""
    model = sharded(kind)
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    backward(model, kind, step=1)
    norms = distopt.grad_norms(opt)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert norms.keys() == set(trainable)
    total = distopt.clip_grad_norm_(opt, max_norm)
    grads = [p.grad for p in trainable if p.grad is not None]
    return (
        total.item(),
        [norms[p].item() for p in trainable],
        [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads],
    )


@pytest.mark.parametrize(("where", "optimizer", "max_norm"), covering(EVERYWHERE, list(OPTIMIZERS), [0.5, math.inf]))
def test_clips_by_the_norm_over_all_ranks(where: tuple[str, int], optimizer: str, max_norm: float) -> None:
    kind, world = where
    model = whole(kind)
    backward(model, kind, step=1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    norms = [0.0 if p.grad is None else p.grad.norm().item() for p in trainable]
    assert norms.count(0.0) == (0 if kind == "tp_fsdp" else 2)
    norm = math.hypot(*norms)
    results = run(world, clip_on, kind, optimizer, max_norm)
    for total, each, grads in results:
        assert total == results[0][0]  # to the last bit, or ranks would part ways
        assert total == pytest.approx(norm, rel=1e-13)
        assert each == pytest.approx(norms, rel=1e-12)
        clipped = [p.grad * min(1.0, max_norm / norm) for p in trainable if p.grad is not None]
        assert distance(grads, clipped) < 1e-12


@pytest.mark.parametrize("bad", ["1.0", None, True, [1.0]], ids=str)
def test_bad_max_norms_of_other_types(bad: Any) -> None:
    _, opt, _ = graded()
    with pytest.raises(ValueError, match=r"max_norm must be >= 0, got .*; give inf to measure"):
        distopt.clip_grad_norm_(opt, bad)


@pytest.mark.parametrize("function", [distopt.clip_grad_norm_, distopt.grad_norms], ids=lambda f: f.__name__)
def test_parameters_are_no_optimizer(function: Any) -> None:
    """torch's function takes them, and says nothing of where their shards are: an AttributeError of `param_groups`."""
    model = torch.nn.Linear(2, 2)
    for given in (model.parameters(), [*model.parameters()], model.weight, model):
        with pytest.raises(TypeError, match=rf"expected an optimizer.* got {type(given).__name__}: call distopt.clip"):
            function(given)
