"""Newton-Schulz: the nearest orthogonal matrix, by matrix products alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Moves the singular values of a matrix towards 1, and leaves its singular vectors.

        X <- M / max(|M|, eps)                               the Frobenius norm: all singular values are at most 1
        X <- a X + (b X X^T + c (X X^T)^2) X                 `steps` times: s <- a s + b s^3 + c s^5 of each of them

    Matrices are computed one by one: products of a batch may be rounded in another way than those of its matrices.

    Args:
        matrix: Shape [rows, columns], contiguous, in the dtype to compute in.
        coefficients: a, b, c. Those of the paper have the steepest slope at 0, and end between 0.7 and 1.2.
        steps: The number of iterations.
        eps: The least divisor.

    Returns:
        A new contiguous matrix.

    Reference: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT.contiguous() if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x


def newton_schulz_cost(rows: int, columns: int) -> float:
    """Returns the multiplications of one iteration: X X^T, its square, and the product with X."""
    low, high = sorted((rows, columns))
    return 2.0 * low * low * high + low**3


def scale(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """Returns the factor of an orthogonal matrix in a direction.

    Args:
        rows: The number of rows, the outputs of a linear layer.
        columns: The number of columns.
        adjust_lr_fn: `original` (or None) makes steps of equal spectral norm of wide and tall matrices;
            `match_rms_adamw` gives the elements the root mean square 0.2 of AdamW's.

    Reference: Liu et al., Muon is Scalable for LLM Training, 2025, arXiv 2502.16982.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
