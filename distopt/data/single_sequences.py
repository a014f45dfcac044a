"""Telling transformers that no row of a batch has several sequences, which it would read from the device."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Keep transformers from looking for packed sequences in the positions of a batch that has none.

    transformers 5.23 (masking_utils.py) finds them by a comparison whose result it reads at the start of every forward
    pass, where the host then waits for all that the device was given before. For fake tensors it assumes packing: every
    block would keep a mask of length times length.
    """
    masks = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if masks is None or find is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find  # type: ignore[attr-defined]
