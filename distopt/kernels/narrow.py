"""What is known of shards that are stored in fewer bits than they are computed with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distopt.kernels.window import Window

WEIGHTS = ""  # the name of the weights, or of their masters, among the state buffers


@dataclass(frozen=True)
class Narrow:
    """Beside the tensors of `Shards`, whose dtypes tell how they are stored; lists in the order of the shards.

        float32     as it is
        bfloat16    rounded at random; with an extra tensor, the remainder, without any rounding
        uint8       codes of blocks, flat, with the scales as extra tensor

    See `distopt.kernels.rounding` and `distopt.kernels.blocks`.

    Attributes:
        windows: Where the elements of each shard are in its full layer.
        keys: A number of each layer, the same on every rank and layout, of which its random numbers are made.
        extras: The other tensor of each shard of weights (`WEIGHTS`) or of a state buffer, by its name; None where it
            has none.
    """

    windows: list[Window]
    keys: list[int]
    extras: dict[str, list[Tensor | None]] = field(default_factory=dict)

    def part(self, indices: list[int]) -> Narrow:
        """Returns what is known of the shards with these indices."""

        def some(column: list[Any]) -> list[Any]:
            return [column[i] for i in indices]

        extras = {name: some(column) for name, column in self.extras.items()}
        return Narrow(some(self.windows), some(self.keys), extras)
