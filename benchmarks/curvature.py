"""The flatness of a minimum: the largest eigenvalue of the Hessian, and the loss under noise on the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_eigenvalue(loss: Callable[[], Tensor], params: Sequence[Tensor], iterations: int, seed: int = 0) -> float:
    """Return a lower bound of the largest eigenvalue of the Hessian of a loss at the weights, by the Lanczos method.

    Args:
        loss: Computes the loss at `params`, by operations that can be differentiated twice.
        params: The weights.
        iterations: The number of Hessian-vector products; each costs about four forward passes.
        seed: The seed of the first vector.
    """
    grads = torch.autograd.grad(loss(), params, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        parts = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in params]), params)]
        return _flat(torch.autograd.grad(grads, params, parts, retain_graph=True))

    start = torch.randn(sum(p.numel() for p in params), generator=torch.Generator().manual_seed(seed))
    basis = [start / start.norm()]
    steps = min(iterations, len(start))
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    for i in range(steps):
        image = product(basis[i])
        tridiagonal[i, i] = image @ basis[i]
        for _ in range(2):  # twice, against all: in float32 the Lanczos vectors lose their orthogonality
            for vector in basis:
                image = image - (image @ vector) * vector
        if i + 1 == steps or image.norm() < 1e-6 * tridiagonal.abs().max():
            break
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = image.norm()
        basis.append(image / image.norm())
    return torch.linalg.eigvalsh(tridiagonal[: i + 1, : i + 1])[-1].item()


@torch.no_grad()
def noisy_loss(
    loss: Callable[[], Tensor], params: Sequence[Tensor], relative: float, draws: int, seed: int = 0
) -> float:
    """Return the mean loss under noise on the weights, which are restored.

    Args:
        loss: Computes the loss at `params`.
        params: The weights.
        relative: The norm of the noise of each tensor, relative to the norm of the tensor.
        draws: The number of draws of the noise.
        seed: The seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    backups, losses = [p.clone() for p in params], []
    for _ in range(draws):
        for p, copy in zip(params, backups):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(copy + noise * (relative * copy.norm() / noise.norm()))
        losses.append(loss().item())
    for p, copy in zip(params, backups):
        p.copy_(copy)
    return sum(losses) / draws


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
