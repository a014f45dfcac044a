"""Lists of tensors that kernels take, with what they ask of all of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # the types whose elements are in their own memory; a subclass's may be anywhere


class Column(list[Tensor]):
    """Local tensors, one for each shard: of weights, of gradients, or of one state buffer.

    What is asked of all of them is asked once, so that a column neither changes nor outlives the memory of its tensors:
    whoever keeps one from step to step compares `addresses` (`distopt.optim.kept`).
    """

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Column:
        """Returns tensors as a column; a column as it is."""
        return tensors if isinstance(tensors, cls) else cls(tensors)

    @cached_property
    def addresses(self) -> array[int]:
        """Where each tensor begins, as 64-bit integers, which a kernel's table is made of."""
        return array("q", map(Tensor.data_ptr, self))

    @cached_property
    def numels(self) -> array[int]:
        """The elements of each tensor, as 64-bit integers."""
        return array("q", map(Tensor.numel, self))

    @cached_property
    def kind(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of all tensors; None if they differ, if a kernel cannot read one, and if there is none."""
        if not set(map(type, self)).issubset(PLAIN) or not all(map(Tensor.is_contiguous, self)):
            return None
        devices, dtypes = {t.device for t in self}, {t.dtype for t in self}
        return (*devices, *dtypes) if len(devices) == len(dtypes) == 1 else None  # type: ignore[return-value]
