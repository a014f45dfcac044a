"""The places of a parameter's local elements in its full layer, for numbers that are rounded by a hash of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from distopt.kernels.window import Window
from distopt.layout.base import ShardLayout
from distopt.layout.places import Box, Place, Run


def windows(layout: ShardLayout, param: Tensor) -> list[Window]:
    """Returns where the elements of each shard of a parameter are, in the order of `ShardLayout.split`.

    Raises:
        ValueError: For a parameter that is sharded along several dimensions besides the first, or along one in strides.
    """
    shape = tuple(layout.full_shape(param))
    return [_window(place, shape) for place in layout.places(param)]


def _window(place: Place, shape: Sequence[int]) -> Window:
    if isinstance(place, Run):
        return Window.run(place.start, place.length)
    if not all(isinstance(index, range) for index in place.indices) or len(_divided(place, shape)) > 1:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} is sharded in strides, or along several dimensions besides the "
            "first, and numbers are rounded by the place of an element in runs: shard it along one dimension, or give "
            "master_weights='float32' and state_bits=32"
        )
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    start = sum(index.start * stride for index, stride in zip(place.indices, strides) if isinstance(index, range))
    for dim in _divided(place, shape):
        width = len(place.indices[dim]) * strides[dim]
        return Window(start, max(1, width), shape[dim] * strides[dim])
    return Window.run(start, math.prod(map(len, place.indices)))


def _divided(place: Box, shape: Sequence[int]) -> list[int]:
    """Returns the dimensions besides the first of which a box has a part."""
    return [dim for dim, index in enumerate(place.indices) if dim and len(index) < shape[dim]]
