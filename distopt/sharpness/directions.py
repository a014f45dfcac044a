"""Random directions in the space of weights, the same at every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distopt import counter
from distopt.layout import local
from distopt.layout.places import global_indices, own_place
from distopt.sharpness.objective import Objective, Vector


def gaussian(objective: Objective, seed: int) -> Vector:
    """Returns a direction of independent standard normal values.

    Each is a hash of seed, parameter and the element's index in the full parameter, so that it does not depend on the
    sharding (`distopt.counter`).
    """
    sequences = zip(objective.params, _sequences(objective, seed))
    return [counter.normals(key, index).to(p.dtype) for p, (key, index) in sequences]


def rademacher(objective: Objective, seed: int) -> Vector:
    """Returns a direction of independent signs, +1 or -1, by the same hash."""
    sequences = zip(objective.params, _sequences(objective, seed))
    return [1.0 - 2.0 * (counter.bits(key, index) & 1).to(p.dtype) for p, (key, index) in sequences]


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


def _sequences(objective: Objective, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the key of each parameter, and the indices of its local elements."""
    for i, p in enumerate(objective.params):
        part = local(p.detach())
        chunks = [index for _, index in global_indices(own_place(p), p.shape, part.device)]
        yield counter.key(f"{seed}/{i}"), torch.cat(chunks or [torch.zeros(0).long()]).view(part.shape)
