"""Where the elements of a shard are in their full layer: what numbers that depend on an element's place are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """The places of a shard's elements in the flattened full layer.

        place(i) = start + j // width * stride + j % width        j = first + i

    A shard of rows, or a range, is consecutive: its width is not less than its number of elements. One of columns has
    a width of its own columns and the stride of the full rows.

    Attributes:
        start: The place of the first element of the window.
        width: The number of consecutive elements.
        stride: The elements between the starts of two such runs.
        first: The number of elements of the window that come before the shard's own, where it is a slice.
    """

    start: int
    width: int
    stride: int
    first: int = 0

    @classmethod
    def run(cls, start: int, numel: int) -> Window:
        """Returns the window of consecutive elements."""
        return cls(start, max(1, numel), max(1, numel))

    def places(self, numel: int, device: torch.device) -> Tensor:
        """Returns the place of each of the first `numel` elements, an int64 tensor."""
        at = torch.arange(self.first, self.first + numel, device=device)
        return at.div(self.width, rounding_mode="floor") * self.stride + at.remainder(self.width) + self.start
