"""Random directions in the space of weights, the same at every number of ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distopt.layout import global_indices, local
from distopt.sharpness.objective import Objective, Vector

_WEYL, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def gaussian(objective: Objective, seed: int) -> Vector:
    """Returns a direction of independent standard normal values.

    Each is a hash of seed, parameter and the element's index in the full parameter, so that it does not depend on the
    sharding: splitmix64 (Steele, Lea, Flood, OOPSLA 2014) in counter mode, then Box and Muller's transformation.
    """
    return [_normal(bits).to(p.dtype) for p, bits in zip(objective.params, _bits(objective, seed))]


def rademacher(objective: Objective, seed: int) -> Vector:
    """Returns a direction of independent signs, +1 or -1, by the same hash."""
    return [1.0 - 2.0 * (bits & 1).to(p.dtype) for p, bits in zip(objective.params, _bits(objective, seed))]


def filter_normalised(objective: Objective, direction: Vector) -> Vector:
    r"""Returns a direction in which each filter has the norm of the model's filter.

        d_i <- d_i * |w_i| / |d_i|     for each row i of a parameter of two axes or more; 0 for the others

    A filter is one index of the first axis: the weights of one output channel of a convolution, of one neuron, of one
    token of an embedding. Parameters of one axis (biases, norm layers) do not move, as in the paper's pictures.

    Reference: Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018,
    arXiv 1712.09913.
    """
    return [
        _rows_as(w, d) if p.ndim > 1 else torch.zeros_like(d)
        for p, w, d in zip(objective.params, objective.weights(), direction)
    ]


def _rows_as(weight: Tensor, direction: Tensor) -> Tensor:
    axes = tuple(range(1, weight.ndim))
    lengths = torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    wanted = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return direction * torch.where(lengths > 0, wanted / lengths, 0.0)


def _bits(objective: Objective, seed: int) -> list[Tensor]:
    """64 random bits for each local element, as int64."""
    keys = [_mixed(torch.tensor([_mixed_once(seed) + i])) for i in range(len(objective.params))]
    return [
        _mixed(global_indices(p).to(local(p.detach()).device) ^ key.to(local(p.detach()).device))
        for p, key in zip(objective.params, keys)
    ]


def _mixed_once(seed: int) -> int:
    return int(_mixed(torch.tensor([seed]))[0]) >> 1  # room for the number of the parameter


def _mixed(counter: Tensor) -> Tensor:
    """splitmix64's output for its state `counter`; int64 products wrap around."""
    z = (counter + 1) * _signed(_WEYL)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """The logical shift to the right; torch's is arithmetic."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _normal(bits: Tensor) -> Tensor:
    """Standard normal values in float64, of 32 bits each for radius and angle."""
    radius = (_shifted(bits, 32).double() + 0.5) / 2**32
    angle = (bits & 0xFFFFFFFF).double() / 2**32
    return (-2.0 * radius.log()).sqrt_() * (2.0 * math.pi * angle).cos_()
