"""Sharpness against closed forms on a quadratic, and the same on shards as in one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distopt import sharpness
from distopt.sharpness import Objective
from tests.harness.distributed import run

SIZES = ((3, 4), (5,), (1, 2))  # the weights of the quadratic, in one vector of 19


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ws = nn.ParameterList(torch.randn(size, dtype=torch.float64) for size in SIZES)
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)

    def flat(self) -> Tensor:
        return torch.cat([w.reshape(-1) for w in self.ws])


def quadratic(values: Any) -> tuple[np.ndarray, np.ndarray, Objective]:
    """H, b and L(w) = w H w / 2 + b w; two batches, whose mean it is."""
    values = np.asarray(values, dtype=float)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(19, 19)))
    h, b = turn @ np.diag(values) @ turn.T, np.random.default_rng(1).normal(size=19)

    def loss(model: nn.Module, weight: float) -> Tensor:
        w = model.flat()
        return weight * (w @ torch.from_numpy(h) @ w / 2 + torch.from_numpy(b) @ w)

    return h, b, Objective(Weights(), loss, [0.5, 1.5])


VALUES = np.concatenate([[9.0, 7.0, 7.0], np.linspace(2.0, -1.0, 16)])


def flat(vector: list[Tensor]) -> np.ndarray:
    return np.concatenate([v.reshape(-1).numpy() for v in vector])


def test_eigenvalues_of_a_quadratic() -> None:
    """Also one that occurs twice, once all 19 directions are searched. 1e-9: rounding of 19 products in float64."""
    _, _, objective = quadratic(VALUES)
    found = sharpness.eigenvalues(objective, k=4, iterations=40, tolerance=0.0)
    assert found.values == pytest.approx([9.0, 7.0, 7.0, 2.0], abs=1e-9)
    assert max(found.errors) < 1e-6 and found.products <= 19
    h, _, _ = quadratic(VALUES)
    v = flat(found.vector)
    assert np.linalg.norm(h @ v - 9.0 * v) < 1e-6 and np.linalg.norm(v) == pytest.approx(1.0)


def test_the_largest_eigenvalue_is_not_that_of_the_largest_magnitude() -> None:
    _, _, objective = quadratic(np.linspace(-9.0, 7.0, 19))
    assert sharpness.eigenvalues(objective, iterations=19, tolerance=0.0).values == pytest.approx([7.0])


def test_the_eigenvalues_of_a_multiple_of_the_identity() -> None:
    """The first product leaves nothing, so that each next vector is a random one."""
    _, _, objective = quadratic(np.full(19, 3.0))
    assert sharpness.eigenvalues(objective, k=3, tolerance=0.0).values == pytest.approx([3.0] * 3)


def test_an_error_bounds_the_distance_to_an_eigenvalue() -> None:
    _, _, objective = quadratic(VALUES)
    found = sharpness.eigenvalues(objective, k=2, iterations=5, tolerance=0.0)
    for value, error in zip(found.values, found.errors):
        assert min(abs(VALUES - value)) <= error + 1e-12 and error > 1e-6


def test_the_trace_is_within_its_error() -> None:
    """200 draws: the mean within 4 standard errors, and these as the variance of z H z says, to 20 % for 200 draws."""
    h, _, objective = quadratic(VALUES)
    found = sharpness.trace(objective, draws=200)
    variance = 2.0 * (np.sum(h**2) - np.sum(np.diag(h) ** 2))
    assert abs(found.value - VALUES.sum()) < 4 * found.error
    assert found.error == pytest.approx(math.sqrt(variance / 200), rel=0.2)
    _, _, diagonal = quadratic(np.full(19, 3.0))
    assert sharpness.trace(diagonal, draws=2).value == pytest.approx(57.0)


def worst_by_multiplier(h: np.ndarray, g: np.ndarray, rho: float) -> float:
    """max over |e| <= rho of g e + e H e / 2: e = (m - H)^-1 g with m > max eigenvalue, by bisection of |e| = rho."""
    values, vectors = np.linalg.eigh(h)
    c = vectors.T @ g
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(c / (middle - values)) > rho else (low, middle)
    e = c / (high - values)
    return float(c @ e + (values * e**2).sum() / 2)


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_the_worst_loss_of_a_quadratic_in_a_ball(rho: float) -> None:
    """Against the trust region's solution by a multiplier. 100 steps converge linearly, to 1e-6 of the rise."""
    h, b, objective = quadratic(VALUES)
    w = flat(objective.weights())
    found = sharpness.worst_loss(objective, rho, steps=100)
    assert found.loss == pytest.approx(w @ h @ w / 2 + b @ w)
    assert found.sharpness == pytest.approx(worst_by_multiplier(h, h @ w + b, rho), rel=1e-6)
    g = h @ w + b
    e = rho * g / np.linalg.norm(g)
    assert found.path[0] - found.loss == pytest.approx(g @ e + e @ h @ e / 2)
    assert (flat(objective.weights()) == w).all()


def test_the_worst_loss_where_the_gradient_is_zero() -> None:
    """1e-3: with neighbouring eigenvalues of 3.8 and 4 each step leaves 0.98 of the error."""
    h, b, objective = quadratic(np.linspace(1.0, 4.0, 19))
    with torch.no_grad():
        w = torch.from_numpy(np.linalg.solve(h, -b))
        for p, part in zip(objective.params, w.split([p.numel() for p in objective.params])):
            p.copy_(part.view_as(p))
    assert sharpness.worst_loss(objective, 0.1, steps=200).sharpness == pytest.approx(4.0 * 0.1**2 / 2, rel=1e-3)


def test_landscapes_of_a_quadratic() -> None:
    h, b, objective = quadratic(VALUES)
    w = flat(objective.weights())
    d, e = (sharpness.filter_normalised(objective, sharpness.gaussian(objective, seed)) for seed in (0, 1))
    for p, w_l, d_l in zip(objective.params, objective.weights(), d):
        if p.ndim > 1:
            assert torch.allclose(w_l.norm(dim=1), d_l.norm(dim=1))
        else:
            assert not d_l.any()
    expected = [[_loss(h, b, w + x * flat(d) + y * flat(e)) for x in (-1, 0, 2)] for y in (-1, 0, 2)]
    assert np.allclose(sharpness.plane(objective, d, e, (-1, 0, 2)), expected)
    assert np.allclose(sharpness.line(objective, d, (-1, 0, 2)), expected[1])


def test_noise_has_the_size_of_each_parameter() -> None:
    """E L(w + e) - L(w) = sum over layers of sigma^2 |w_l|^2 tr(H_l) / (2 n_l); within 4 standard errors."""
    h, b, objective = quadratic(VALUES)
    w, at, expected = flat(objective.weights()), 0, 0.0
    for size in SIZES:
        n = math.prod(size)
        expected += 0.01 * (w[at : at + n] ** 2).sum() * np.diag(h)[at : at + n].sum() / (2 * n)
        at += n
    found = sharpness.noisy_loss(objective, 0.1, draws=400)
    assert abs(found.value - _loss(h, b, w) - expected) < 4 * found.error


def test_random_directions() -> None:
    """Moments of 19 * 200 normal values, within 4 standard errors; signs of both kinds."""
    _, _, objective = quadratic(VALUES)
    draws = np.concatenate([flat(sharpness.gaussian(objective, seed)) for seed in range(200)])
    assert abs(draws.mean()) < 4 / math.sqrt(3800) and abs((draws**2).mean() - 1) < 4 * math.sqrt(2 / 3800)
    signs = np.concatenate([flat(sharpness.rademacher(objective, seed)) for seed in range(200)])
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 4 / math.sqrt(3800)
    assert len(set(draws)) == len(draws)


def _loss(h: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
    return float(w @ h @ w / 2 + b @ w)


def test_bad_input_is_refused() -> None:
    _, _, objective = quadratic(VALUES)
    for call, said in {
        lambda: sharpness.worst_loss(objective, 0.0): "rho must be a number > 0, got 0",
        lambda: sharpness.worst_loss(objective, 0.1, steps=0): "steps must be an integer >= 1, got 0",
        lambda: sharpness.eigenvalues(objective, 20): "k must be at most the number of trainable weights, 19, got 20",
        lambda: sharpness.eigenvalues(objective, 5, iterations=3): "iterations must be an integer >= 5, got 3",
        lambda: sharpness.trace(objective, 1): "draws must be an integer >= 2, got 1",
        lambda: sharpness.noisy_loss(objective, -0.1): "relative must be a number > 0, got -0.1",
        lambda: Objective(objective.model, objective.loss, []): "at least one batch",
        lambda: Objective(nn.Linear(2, 2).bfloat16(), objective.loss, [1]): "call model.float() first",
    }.items():
        with pytest.raises(ValueError) as raised:
            call()
        assert said in str(raised.value)


# On shards.


class Net(nn.Module):
    """Rows that do not divide by the ranks, tied weights, dropout, and a parameter that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.down.weight = nn.Parameter(self.down.weight.detach().clone())
        self.again = nn.Linear(5, 3, bias=False)
        self.again.weight = self.down.weight
        self.unused = nn.Parameter(torch.ones(1, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.up(x).tanh())
        return self.down(x) + self.again(x).sin()


def net_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.cos()).square().mean()


def probes(kind: str) -> list[list[float]]:
    """All that is measured, of a model over this rank's share of 12 samples in two batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model: nn.Module = Net()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    samples = torch.sin(torch.arange(36, dtype=torch.float64)).view(2, 6, 3)
    objective = Objective(model, net_loss, [batch.chunk(world)[rank] for batch in samples])
    before = [w.clone() for w in objective.weights()]
    objective.params[0].grad = kept = torch.full_like(objective.params[0], 7.0)
    worst = sharpness.worst_loss(objective, 0.5, steps=4)
    found = sharpness.eigenvalues(objective, k=3, iterations=12)
    d, e = (sharpness.filter_normalised(objective, sharpness.gaussian(objective, seed)) for seed in (3, 4))
    values = [
        [worst.loss, worst.worst, *worst.path],
        list(found.values),
        [sharpness.trace(objective, 3).value],
        [sharpness.noisy_loss(objective, 0.2, draws=2).value],
        sharpness.line(objective, d, (-1.0, 0.5)),
        sharpness.plane(objective, d, e, (-0.5, 1.0))[1],
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, objective.weights()))
    assert objective.params[0].grad is kept and objective.params[1].grad is None
    assert model.training and objective.model.drop.training
    return values


KINDS = [("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3)]


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_on_shards_as_in_one_process(kind: str, world: int) -> None:
    """1e-12 by rounding; where FSDP2's products are differences of gradients, their error: 1e-6 of curvature."""
    (expected,) = run(1, probes, "plain")
    for found in run(world, probes, kind):
        assert len(found) == 6
        for i, (a, b) in enumerate(zip(found, expected)):
            assert a == pytest.approx(b, rel=1e-6 if kind == "fsdp2" and i in (1, 2) else 1e-12), i


def test_deepspeed_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # as stage 3 marks its parameters
    with pytest.raises(ValueError, match="does not run under DeepSpeed"):
        Objective(model, net_loss, [torch.ones(1, 2)])
