"""The largest eigenvalues of the Hessian, by Lanczos, and its trace, by Hutchinson's estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distopt.bounds import integer, number
from distopt.sharpness.directions import gaussian, rademacher
from distopt.sharpness.mean import Mean
from distopt.sharpness.objective import Objective, Vector


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of the Hessian, the largest first.

    Attributes:
        values: Ritz values: lower bounds of the eigenvalues, in exact arithmetic.
        errors: For each the norm of its residual, |H v - value v|: there is an eigenvalue within this distance.
        vector: The unit vector of the largest.
        products: The number of Hessian-vector products taken.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vector: Vector
    products: int


def eigenvalues(
    objective: Objective, k: int = 1, iterations: int = 30, tolerance: float = 1e-3, seed: int = 0
) -> Eigenvalues:
    r"""Computes the k largest eigenvalues of the Hessian at the weights, by the Lanczos method.

        w = H q_j - sum over i <= j of (q_i . H q_j) q_i,     q_{j+1} = w / |w|
        the eigenvalues of T = Q^T H Q approach those of H, the extreme ones first

    Every vector is orthogonalised against all earlier ones, twice, by one all-reduce each: in finite precision it would
    otherwise find copies of the same eigenvalue. Where w vanishes it goes on with a new random vector, without which an
    eigenvalue that occurs several times is found once. Memory: one vector, sharded as the weights, per iteration.

    Args:
        objective: The loss.
        k: The number of eigenvalues, in [1, number of weights].
        iterations: The most Hessian-vector products, >= k; each costs about two gradients.
        tolerance: It stops once the residuals of all k are below this share of the largest |eigenvalue|; >= 0.
        seed: The seed of the random vectors.

    Raises:
        ValueError: If an argument is out of bounds.

    Reference: Golub, Van Loan, Matrix Computations, 4th edition, section 10.3; Ghorbani, Krishnan, Xiao, An
    Investigation into Neural Net Optimization via Hessian Eigenvalue Density, ICML 2019, arXiv 1901.10159.
    """
    integer(1).check("k", k)
    if k > objective.numel:
        raise ValueError(f"k must be at most the number of trainable weights, {objective.numel}, got {k}")
    integer(k).check("iterations", iterations, f"k={k} eigenvalues need as many products")
    number(0).check("tolerance", tolerance)
    steps = min(iterations, objective.numel)
    t = torch.zeros(steps, steps, dtype=torch.float64)
    basis = [_orthogonal(objective, gaussian(objective, seed), [])]
    for j in range(steps):
        image = objective.product(basis[j])
        column = torch.tensor(_project(objective, image, basis), dtype=torch.float64)
        t[: j + 1, j] = t[j, : j + 1] = column
        rest = objective.norm(image)
        values, vectors = torch.linalg.eigh(t[: j + 1, : j + 1])
        errors = rest * vectors[-1].abs()
        size = values.abs().max().item()
        if j + 1 == steps or (j + 1 >= k and bool((errors[-k:] <= tolerance * size).all())):
            break
        vanished = rest <= torch.finfo(image[0].dtype).eps * max(size, 1e-300) * 10
        basis.append(
            _orthogonal(objective, gaussian(objective, seed + j + 1), basis) if vanished else _scaled(image, rest)
        )
    top = [sum(c * q[i] for c, q in zip(vectors[:, -1].tolist(), basis)) for i in range(len(basis[0]))]
    return Eigenvalues(
        tuple(values[-k:].flip(0).tolist()),
        tuple(errors[-k:].flip(0).tolist()),
        top,
        len(basis),
    )


def trace(objective: Objective, draws: int = 30, seed: int = 0) -> Mean:
    r"""Estimates the trace of the Hessian at the weights: the mean of z^T H z over random signs z (Hutchinson).

    Args:
        objective: The loss.
        draws: The number of sign vectors, >= 2; each costs about two gradients.
        seed: The seed of the first one.

    Returns:
        The mean and its standard error. The variance of a draw is twice the sum of the squares off the diagonal.

    Raises:
        ValueError: If `draws` is out of bounds.

    Reference: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990,
    doi 10.1080/03610919008812866; Yao, Gholami, Keutzer, Mahoney, PyHessian, 2020, arXiv 1912.07145.
    """
    integer(2).check("draws", draws, "one draw has no standard error")
    found = []
    for draw in range(draws):
        signs = rademacher(objective, seed + draw)
        found.append(objective.dots((signs, objective.product(signs)))[0])
    return Mean.of(found)


def _project(objective: Objective, vector: Vector, basis: list[Vector]) -> list[float]:
    """Makes a vector orthogonal to a basis, in place; returns its coefficients along the basis."""
    total = [0.0] * len(basis)
    for _ in range(2):
        coefficients = objective.dots(*((vector, q) for q in basis))
        for c, q in zip(coefficients, basis):
            torch._foreach_add_(vector, q, alpha=-c)
        total = [a + b for a, b in zip(total, coefficients)]
    return total


def _orthogonal(objective: Objective, vector: Vector, basis: list[Vector]) -> Vector:
    if basis:
        _project(objective, vector, basis)
    return _scaled(vector, objective.norm(vector))


def _scaled(vector: Vector, norm: float) -> Vector:
    return [v / norm for v in vector]
