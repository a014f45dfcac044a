"""How flat a minimum is: the Hessian's largest eigenvalue, and the loss under noise on the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_eigenvalue(loss: Callable[[], Tensor], params: Sequence[Tensor], iterations: int, seed: int = 0) -> float:
    """The largest eigenvalue of the Hessian of a loss at the weights, from below, by Lanczos' method.

    loss: computes the loss at `params` anew, by operations that can be differentiated twice.
    iterations: Hessian-vector products; each costs about four forward passes.
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
        for _ in range(2):  # against all, twice: in float32 Lanczos' vectors lose their right angles
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
    """The mean loss at weights to each of which noise of `relative` times its norm is added; the weights stay."""
    numbers = torch.Generator().manual_seed(seed)
    kept, losses = [p.clone() for p in params], []
    for _ in range(draws):
        for p, copy in zip(params, kept):
            noise = torch.randn(p.shape, generator=numbers)
            p.copy_(copy + noise * (relative * copy.norm() / noise.norm()))
        losses.append(loss().item())
    for p, copy in zip(params, kept):
        p.copy_(copy)
    return sum(losses) / draws


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
