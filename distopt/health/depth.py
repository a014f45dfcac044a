"""Vanishing and exploding gradients: how the gradient norm of equal layers changes with their depth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_FEWEST = 6  # layers: fewer have no trend


class Series(NamedTuple):
    """Layers of the same kind at increasing depth, such as `h.*.attn.c_proj.weight`.

    Attributes:
        name: Their names, with `*` for the number that differs.
        layers: The indices of the layers, from the input to the output.
    """

    name: str
    layers: list[int]


class Trend(NamedTuple):
    """How a quantity changes over a series.

    Attributes:
        series: The series.
        factor: What one layer multiplies a gradient's norm by on its way back: < 1 vanishes, > 1 explodes.
        total: The same over the depth of the series.
        fit: The share of the variance of the logarithm that the factor explains, r^2.
    """

    series: Series
    factor: float
    total: float
    fit: float


def find_series(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Series]:
    """Returns the series of a model: names that differ in their first number only, and shapes that are equal.

    Args:
        names: The names of the parameters.
        shapes: Their full shapes.
    """
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for i, (name, shape) in enumerate(zip(names, shapes)):
        if number := re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", name):
            pattern = f"{name[: number.start()]}*{name[number.end() :]}"
            found.setdefault((pattern, tuple(shape)), []).append((int(number.group()), i))
    return [
        Series(pattern, [i for _, i in sorted(members)])
        for (pattern, _), members in found.items()
        if len(members) >= _FEWEST
    ]


def trend(series: Series, logarithms: Sequence[float]) -> Trend | None:
    r"""Fits log |g| = a + b * depth by least squares over the layers of a series.

        factor = exp(-b)

    A gradient comes from the output, where the depth is largest. The gradient of a weight is the product of what comes
    back and of the layer's input: if both shrink by the same factor per layer, in opposite directions, it does not
    change with depth, and only the series of the biases, whose gradient is what comes back, shows the factor.

    Args:
        series: The layers.
        logarithms: The logarithm of the norm of every layer of the model; nan where it is unknown.

    Returns:
        None if fewer than six layers are known.
    """
    points = [(x, logarithms[layer]) for x, layer in enumerate(series.layers)]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < _FEWEST:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    xx = sum((x - mean_x) ** 2 for x, _ in points)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in points)
    yy = sum((y - mean_y) ** 2 for _, y in points)
    slope = -xy / xx
    exponent = max(-700.0, min(700.0, slope * (len(series.layers) - 1)))  # a float ends at exp(709)
    return Trend(series, math.exp(slope), math.exp(exponent), xy * xy / (xx * yy) if yy > 0.0 else 0.0)
