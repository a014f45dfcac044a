"""Adversarial examples: FGSM and PGD on inputs or embeddings, and the accuracy under them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distopt.bounds import choice, integer, number

PerSample = Callable[[Tensor], Tensor]  # inputs [n, ...] -> the loss of each sample, [n]
_NORM = choice("linf", "l2")


def fgsm(
    loss: PerSample, inputs: Tensor, eps: float, *, norm: str = "linf", clamp: tuple[float, float] | None = None
) -> Tensor:
    r"""Moves each sample once up its loss, to the edge of its ball (the fast gradient sign method).

        linf:  x <- clamp(x + eps * sign(g))          l2:  x <- clamp(x + eps * g / |g|)

    The weights' gradients are not touched. On a sharded model every rank has to call it, with its own samples.

    Args:
        loss: Returns the loss of each sample, shape [n], at inputs of shape [n, ...]: pixels, or the embeddings that a
            language model takes as `inputs_embeds`. Put the model in `eval` mode: batch norm would couple the samples.
        inputs: The samples, of any float dtype.
        eps: The radius, >= 0, in units of the inputs: the largest change of a value (`linf`), or the 2-norm of a
            sample's change over all its values (`l2`).
        norm: `linf` or `l2`.
        clamp: The range of valid inputs, (low, high); None for none, as for embeddings.

    Returns:
        The moved inputs, detached. A sample without a gradient stays as it is.

    Raises:
        ValueError: If an argument is out of bounds.

    Reference: Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial Examples, ICLR 2015, arXiv 1412.6572.
    """
    _check(eps, norm, clamp)
    inputs = inputs.detach()
    return _clamped(inputs + eps * _steepest(_gradient(loss, inputs), norm), clamp)


def pgd(
    loss: PerSample,
    inputs: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    clamp: tuple[float, float] | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Searches the worst input near each sample, by projected gradient ascent from random starts.

        x_0 = clamp(x + u)                                 u is uniform in the ball
        x_{t+1} = clamp(P(x_t + step_size * direction))    direction: sign(g) for linf, g / |g| for l2

    P projects onto the ball of radius eps around the sample. As in Madry et al. each restart's last point counts; for
    each sample the one of the largest loss is returned, or the sample itself where none is worse. The number of
    gradients does not depend on the samples, so that the ranks of a sharded model stay together.

    Args:
        loss: As for `fgsm`.
        inputs: As for `fgsm`.
        eps: As for `fgsm`.
        norm: As for `fgsm`.
        steps: The number of gradients of each restart, >= 1.
        step_size: The length of a step, > 0, in units of the inputs; by default 2.5 * eps / steps, with which any point
            of the ball can be reached from any other.
        restarts: The number of random starts, >= 1.
        clamp: As for `fgsm`.
        seed: The seed of the starts.

    Returns:
        The moved inputs, detached.

    Raises:
        ValueError: If an argument is out of bounds.

    Reference: Madry, Makelov, Schmidt, Tsipras, Vladu, Towards Deep Learning Models Resistant to Adversarial Attacks,
    ICLR 2018, arXiv 1706.06083.
    """
    _check(eps, norm, clamp)
    integer(1).check("steps", steps, "one step without a random start is fgsm")
    integer(1).check("restarts", restarts)
    if step_size is None:
        step_size = 2.5 * eps / steps
    else:
        number(0, above=True).check("step_size", step_size)
    inputs = inputs.detach()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        worst, most = inputs.clone(), loss(inputs)
    for _ in range(restarts):
        x = _clamped(inputs + eps * _uniform(inputs, norm, generator), clamp)
        for _ in range(steps):
            moved = x + step_size * _steepest(_gradient(loss, x), norm)
            x = _clamped(inputs + _projected(moved - inputs, eps, norm), clamp)
        with torch.no_grad():
            losses = loss(x)
        worse = losses > most
        worst[worse] = x[worse]
        most = torch.where(worse, losses, most)
    return worst


@torch.no_grad()
def accuracy(logits: Callable[[Tensor], Tensor], inputs: Tensor, classes: Tensor) -> float:
    """Returns the share of samples whose largest logit is that of their class.

    Args:
        logits: Returns the logits of inputs, shape [n, classes].
        inputs: The samples, [n, ...], as they are or attacked.
        classes: The class of each sample, int64, shape [n].
    """
    return float((logits(inputs).argmax(-1) == classes).double().mean())


def _check(eps: float, norm: str, clamp: tuple[float, float] | None) -> None:
    number(0).check("eps", eps, "it is a radius")
    _NORM.check("norm", norm)
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}; None for no range")


def _gradient(loss: PerSample, inputs: Tensor) -> Tensor:
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(inputs)
        if losses.shape != inputs.shape[:1]:
            raise ValueError(
                f"loss must return one value for each of the {len(inputs)} samples, got shape {tuple(losses.shape)}: "
                'use reduction="none"'
            )
        return torch.autograd.grad(losses.sum(), inputs)[0]


def _steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in which the loss grows most; 0 where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    lengths = _lengths(gradient)
    return torch.where(lengths > 0, gradient / lengths, 0.0)


def _projected(move: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return move.clamp(-eps, eps)
    lengths = _lengths(move)
    return torch.where(lengths > eps, move * (eps / lengths), move)


def _uniform(inputs: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Uniform in the unit ball of each sample."""
    if norm == "linf":
        return (2.0 * torch.rand(inputs.shape, generator=generator) - 1.0).to(inputs)
    directions = _steepest(torch.randn(inputs.shape, generator=generator), norm)
    radii = torch.rand(len(inputs), generator=generator) ** (1.0 / max(1, inputs[0].numel() if len(inputs) else 1))
    return (directions * radii.view(-1, *[1] * (inputs.ndim - 1))).to(inputs)


def _lengths(samples: Tensor) -> Tensor:
    """The 2-norm of each sample, with axes of one element for the others."""
    lengths = torch.linalg.vector_norm(samples.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (samples.ndim - 1))


def _clamped(inputs: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    return inputs.detach() if clamp is None else inputs.detach().clamp(*clamp)
