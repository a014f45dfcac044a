"""muP: how the first values and the learning rate of each parameter change with the width of the model.

    r_in, r_out: fan_in and fan_out, divided by those of the base model
    standard deviation    *= min(1, sqrt(r_out / r_in)) / sqrt(r_in)
    learning rate (Adam)  *= 1 / r_in
    learning rate (SGD)   *= r_out / r_in

| parameter | r_in, r_out | deviation | Adam | SGD |
|---|---|---|---|---|
| embedding, bias, gain of a norm, layer from inputs of a fixed number | 1, r | 1 | 1 | r |
| hidden matrix | r, r | 1 / sqrt(r) | 1 / r | 1 |
| layer to outputs of a fixed number | r, 1 | 1 / r | 1 / r | 1 / r |

The table is the paper's Table 3, which has no multipliers in the forward pass: a checkpoint is a plain one, which any
program can read. In one formula it is that of Yang, Simon, Bernstein, "A Spectral Condition for Feature Learning",
2023, arXiv 2310.17813. The package `mup` of the authors follows the paper's Table 8 instead, which multiplies the
logits by 1 / r and gives the last layer an Adam rate of 1: the same function of training, as the paper shows.

Reference: G. Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
2022, arXiv 2203.03466.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from distopt.init.roles import Named, roles
from distopt.layout import full_shape
from distopt.layout.names import bare_parameters

Shapes = Mapping[str, Sequence[int]]


class Width(NamedTuple):
    """The fans of a parameter, divided by those in the base model; both >= 1."""

    fan_in: float = 1.0
    fan_out: float = 1.0

    @property
    def std(self) -> float:
        """The factor of the standard deviation of the first values."""
        return min(1.0, math.sqrt(self.fan_out / self.fan_in)) / math.sqrt(self.fan_in)

    def lr(self, rule: str) -> float:
        """Returns the factor of the learning rate, for `adam` or `sgd`."""
        return 1.0 / self.fan_in if rule == "adam" else self.fan_out / self.fan_in


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the full shapes of a model's parameters by name: of the base model, which may be on the meta device.

    They are numbers and names only, so that they can be stored as JSON with the hyper-parameters that were found.
    """
    return {name: tuple(full_shape(param)) for name, param in bare_parameters(model).items()}


def widths(model: nn.Module, base: nn.Module | Shapes) -> dict[str, Width]:
    """Compares a model with its base model, the small one whose hyper-parameters are known.

    Args:
        model: The model to train: plain, on the meta device, or sharded.
        base: A narrower model of the same family, depth and vocabulary, on the meta device too; or its shapes by name,
            as `base_shapes` returns them.

    Returns:
        The width of each parameter by name.

    Raises:
        ValueError: If the names or the numbers of dimensions differ; if a dimension is smaller than in the base model;
            if the vocabularies differ; if an embedding is tied to the last layer; or if a parameter that grows in two
            dimensions belongs to a module of which the fan is unknown.
    """
    shapes = base_shapes(base) if isinstance(base, nn.Module) else base
    if not isinstance(shapes, Mapping):
        raise ValueError(f"mup must be the base model, or its shapes by name, got {type(base).__name__}")
    found = roles(model)
    names = {named.name for named in found}
    if missing := sorted(names ^ shapes.keys()):
        where = "the base model" if missing[0] in names else "the model"
        raise ValueError(
            f"{missing[0]} is missing in {where}: the base model differs from the model in width only, so give one of "
            "the same family and depth"
        )
    return {named.name: _width(named, tuple(shapes[named.name])) for named in found}


def _width(named: Named, base: tuple[int, ...]) -> Width:
    shape = tuple(full_shape(named.param))
    if len(base) != len(shape) or any(small < 1 or small > large for small, large in zip(base, shape)):
        raise ValueError(
            f"{named.name} has the shape {list(base)} in the base model and {list(shape)} in the model: the base model "
            "has as many dimensions and is at most as wide, so give a narrower one"
        )
    kinds = {role.kind for role in named.roles}
    if kinds == {"embedding", "matrix"} and base != shape:
        raise ValueError(
            f"{named.name} is tied: muP needs another learning rate for the embedding than for the last layer; untie "
            "them (model.config.tie_word_embeddings=false)"
        )
    ratios = [large / small for small, large in zip(base, shape)]
    if "embedding" in kinds:
        if ratios[0] != 1.0:
            raise ValueError(
                f"{named.name} has {shape[0]} rows, and {base[0]} in the base model: give it the same vocabulary"
            )
        return Width(1.0, ratios[1])
    if named.role.kind == "matrix":
        small, large = named.fans(base), named.fans(shape)
        return Width(large[0] / small[0], large[1] / small[1])
    growing = [ratio for ratio in ratios if ratio != 1.0]
    if len(growing) > 1:
        raise ValueError(
            f"{named.name} of shape {list(shape)} belongs to {named.role.module}, whose fan is unknown, and grows in "
            f"{len(growing)} dimensions: muP has no rule for it; compute with nn.Linear, or keep its width"
        )
    return Width(1.0, *growing)
