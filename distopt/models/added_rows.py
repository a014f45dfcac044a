"""Rows that a pretrained model gains for additional tokens: the mean of those that it has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AddedRows:
    """The ids of additional tokens, and the tensors that have a row for each token.

    Attributes:
        first: The id of the first one, which is the number of tokens before.
        stop: One more than the id of the last one. A model may have had rows for these ids, which no token used.
        names: The names of the tensors.
    """

    first: int
    stop: int
    names: Collection[str]

    @classmethod
    def of(cls, model: PreTrainedModel, first: int, stop: int) -> AddedRows:
        """Return the added rows of a model's embedding and of its output layer."""
        modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        wanted = {id(p) for module in modules for p in module.parameters(recurse=False)}
        named = model.named_parameters(remove_duplicate=False)
        return cls(first, stop, [name for name, p in named if id(p) in wanted])

    def fit(self, name: str, value: Tensor, expected: Tensor) -> bool:
        """Return whether a tensor of the files is that of the model without some of its last rows."""
        rows = self.first <= len(value) <= len(expected) if value.ndim else False
        return name in self.names and rows and value.shape[1:] == expected.shape[1:]

    def needed(self, name: str, rows: tuple[int, int] | None) -> bool:
        """Return whether there are added rows among some rows of a tensor; None is all of them."""
        return name in self.names and (rows is None or (rows[0] < self.stop and rows[1] > self.first))

    def extend(self, value: Tensor, rows: tuple[int, int] | None, count: int) -> Tensor:
        """Return rows of the model's tensor, in float32.

        Args:
            value: The tensor of the files.
            rows: The first row and the last, exclusive; None for all of them.
            count: The number of rows that the model has.
        """
        start, stop = rows or (0, count)
        grown = torch.empty(stop - start, *value.shape[1:])
        kept = value[start : min(stop, len(value))]
        grown[: len(kept)] = kept
        added = slice(max(self.first - start, 0), max(self.stop - start, 0))
        grown[added] = value[: self.first].mean(dim=0, dtype=torch.float32)
        return grown
