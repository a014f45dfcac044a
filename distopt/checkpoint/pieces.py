"""Which rank writes which piece of each tensor into which place of its file, agreed by the ranks once.

A rank's file is its pieces one after another, as the bytes of C-contiguous arrays. Pieces that several ranks hold
are divided among them.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt import collective

_ALIGNMENT = 64  # bytes: a piece in the file can be read as an array of any dtype


class Piece(NamedTuple):
    """A box of one tensor: the elements from `offsets` on, `sizes` in each dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.sizes) * getattr(torch, self.dtype).itemsize


class Plan(NamedTuple):
    """What the ranks have agreed on.

    Attributes:
        token: The same on every rank, and different for different plans.
        own: The pieces that this rank writes, with their positions in its file.
        size: The size of this rank's file in bytes.
        owned: On rank 0, the names of the pieces of each rank; elsewhere nothing.
        index: On rank 0, the index of all files; elsewhere nothing.
    """

    token: str
    own: list[tuple[Piece, int]]
    size: int
    owned: list[list[str]]
    index: bytes  # type: ignore[assignment]


def pieces(name: str, tensor: Tensor) -> list[tuple[Piece, Tensor]]:
    """Returns the pieces of a tensor on this rank, with their values. Empty ones are left out.

    A scalar is taken as a vector of one element.
    """
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape) or (1,)
    if not tensor.ndim:
        local: Any = tensor
        value = local.to_local() if hasattr(tensor, "to_local") else tensor
        found = [(Piece(name, dtype, shape, (0,), (1,)), value.detach().view(1))] if value.numel() else []
    elif not hasattr(tensor, "__create_chunk_list__"):
        found = [(Piece(name, dtype, shape, (0,) * len(shape), shape), tensor.detach())]
    else:  # the protocol of DTensor, which RangeShard has as well
        from torch.distributed.checkpoint.metadata import MetadataIndex

        local = tensor
        found = [
            (
                Piece(name, dtype, shape, tuple(chunk.offsets), tuple(chunk.sizes)),
                local.__get_tensor_shard__(MetadataIndex(name, chunk.offsets)).detach(),
            )
            for chunk in local.__create_chunk_list__()
            if math.prod(chunk.sizes)
        ]
    return [(piece, values) for piece, values in found if math.prod(piece.sizes)]


def lay_out(own: Sequence[Piece]) -> tuple[list[tuple[Piece, int]], int]:
    """Returns pieces with their positions in a file, and the size of the file."""
    placed, end = [], 0
    for piece in own:
        placed.append((piece, end))
        end += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
    return placed, end


def assign(held: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Divides the pieces that the ranks hold, so that each is written once and files have similar sizes.

    Args:
        held: The pieces of each rank.

    Raises:
        ValueError: If pieces of a tensor do not cover it, so that it could not be loaded.
    """
    holders: dict[Piece, list[int]] = defaultdict(list)
    for rank, own in enumerate(held):
        for piece in own:
            holders[piece].append(rank)
    _check_cover(holders)
    owned: list[list[Piece]] = [[] for _ in held]
    loads = [0] * len(held)
    # What only one rank holds comes first, then the largest ones.
    for piece, ranks in sorted(holders.items(), key=lambda item: (len(item[1]) > 1, -item[0].nbytes)):
        rank = ranks[0] if len(ranks) == 1 else min(ranks, key=loads.__getitem__)
        owned[rank].append(piece)
        loads[rank] += piece.nbytes
    return owned


def _check_cover(holders: Mapping[Piece, Any]) -> None:
    covered: dict[str, int] = defaultdict(int)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for piece in holders:
        covered[piece.name] += math.prod(piece.sizes)
        if kinds.setdefault(piece.name, (piece.dtype, piece.shape)) != (piece.dtype, piece.shape):
            raise ValueError(
                f"{piece.name} is {list(piece.shape)} {piece.dtype} on one rank and {list(kinds[piece.name][1])} "
                f"{kinds[piece.name][0]} on another: build the same model on every rank"
            )
    for name, (_, shape) in kinds.items():
        if covered[name] != math.prod(shape):
            raise ValueError(f"the ranks hold {covered[name]} of the {math.prod(shape)} elements of {name}")


def index_of(owned: Sequence[Sequence[Piece]]) -> bytes:
    """Returns the index of all files: JSON of the dtype and shape of each tensor, and of where its pieces are.

    A piece is a list: its rank, its position in the rank's file, its offsets, its sizes.
    """
    tensors: dict[str, Any] = {}
    for rank, own in enumerate(owned):
        for piece, position in lay_out(own)[0]:
            entry = tensors.setdefault(piece.name, [piece.dtype, piece.shape, []])
            entry[2].append([rank, position, *piece.offsets, *piece.sizes])
    return json.dumps(tensors, separators=(",", ":")).encode()


class Plans:
    """The plans of the last few kinds of checkpoints, so that the ranks plan only once for each.

    They are kept by a digest of the pieces that this rank holds; a plan is used again if every rank has kept it.

    Args:
        kept: The number of plans to keep.
    """

    def __init__(self, kept: int = 4) -> None:
        self._plans: dict[bytes, Plan] = {}
        self._kept = kept

    def token(self, held: Sequence[Piece]) -> str | None:
        """Returns the token of the plan for these pieces; None if there is none yet."""
        plan = self._plans.get(_digest(held))
        return None if plan is None else plan.token

    def get(self, held: Sequence[Piece], agreed: bool) -> Plan:
        """Returns the plan for these pieces. Every rank must call it.

        Args:
            held: The pieces that this rank holds.
            agreed: Whether `token` was the same on every rank, and not None.

        Raises:
            ValueError: As `assign` does, on every rank.
        """
        key = _digest(held)
        if not agreed:
            self._plans[key] = _plan(held)
            while len(self._plans) > self._kept:
                del self._plans[next(iter(self._plans))]
        return self._plans[key]


def _plan(held: Sequence[Piece]) -> Plan:
    """Makes a plan on rank 0, and gives each rank its part of it."""
    every = collective.gather(list(map(tuple, held)))
    owned: list[list[Piece]] = []

    def make() -> str:
        owned.extend(assign([[Piece(*piece) for piece in own] for own in every]))  # type: ignore[arg-type]
        return uuid.uuid4().hex

    token = collective.on_first(make)
    mine = collective.scatter([list(map(tuple, each)) for each in owned])
    own = [Piece(*piece) for piece in mine]  # type: ignore[arg-type]
    return Plan(token, *lay_out(own), [[piece.name for piece in each] for each in owned], index_of(owned))


def _digest(held: Sequence[Piece]) -> bytes:
    return hashlib.blake2b(repr((collective.world(), *map(tuple, held))).encode()).digest()
