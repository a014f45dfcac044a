"""Units of FSDP2: which modules are gathered and reduced in one message, and along which dimension weights are sharded.

A unit is gathered before its forward pass, and its gradients are reduced after its backward pass. Small units cost
latency, large ones memory. The rules here know sizes alone, so that `distopt.plan` uses them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

_LEAST, _PER_RANK = 2**24, 2**18


class Ends(NamedTuple):
    """The modules outside of the blocks that are units of their own; None for those that stay with the rest.

    Attributes:
        embedding: The input embedding.
        head: The output layer.
    """

    embedding: nn.Module | None
    head: nn.Module | None


def unit_bytes(unit_mib: int | None, ranks: int) -> int:
    """Return the bytes of weights, in the dtype in which they are gathered, up to which blocks share a unit.

    By default 16 MiB, and at least 256 KiB for each rank: in a ring every rank sends as many messages as there are
    ranks, each of one share of the unit, which has to be large enough that its latency does not count.

    Args:
        unit_mib: The size in MiB; 0 for a unit of its own for each block; None for the default.
        ranks: The ranks among which a unit is sharded.
    """
    return max(_LEAST, _PER_RANK * ranks) if unit_mib is None else unit_mib * 2**20


def grouped(sizes: Sequence[int], most: int) -> list[range]:
    """Divide consecutive blocks into as few units of at most about `most` bytes as there can be, of about equal size.

    Args:
        sizes: The bytes of each block. A block that is larger than `most` is a unit.
        most: The bytes of a unit; 0 for a unit for each block.

    Returns:
        The indices of the blocks of each unit.
    """
    total = sum(sizes)
    count = min(len(sizes), math.ceil(total / most)) if most else len(sizes)
    units: dict[int, list[int]] = {}
    before = 0
    for i, size in enumerate(sizes):
        # A block belongs to the unit in which its middle is, if the model is cut into `count` equal parts.
        at = i if count == len(sizes) else int(count * (before + size / 2) / max(total, 1))
        units.setdefault(at, []).append(i)
        before += size
    return [range(unit[0], unit[-1] + 1) for unit in units.values()]


def ends(model: nn.Module) -> Ends:
    """Return the embedding and the head of a language model where they have weights of their own.

    Tied weights are needed from the first operation of a pass to the last one, with everything else that is outside of
    the blocks.
    """
    embedding, head = (_module(model, f"get_{side}_embeddings") for side in ("input", "output"))
    tied = {id(p) for p in (embedding.parameters() if embedding else ())}
    if embedding is None or head is None or any(id(p) in tied for p in head.parameters()):
        return Ends(None, None)
    return Ends(embedding, head)


def _module(model: nn.Module, getter: str) -> nn.Module | None:
    found: Any = getattr(model, getter, lambda: None)()
    return found if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else None


def needs_no_weight_in_backward(embedding: nn.Module) -> bool:
    """Return whether the gradient of an embedding is computed without its weight: that of torch's own is."""
    return type(embedding).forward is nn.Embedding.forward and not any(True for _ in embedding.children())
