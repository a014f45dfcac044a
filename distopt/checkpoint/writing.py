"""The writing of a checkpoint: each rank its file, then rank 0 the manifest, which completes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distopt import collective
from distopt.checkpoint import folder, shards
from distopt.checkpoint import index as indices
from distopt.checkpoint.pieces import Piece, Plan
from distopt.checkpoint.plain import dumps
from distopt.checkpoint.storage import PathLike, storage
from distopt.checkpoint.verify import fingerprint_of
from distopt.failures import FileError


@dataclass
class Writing:
    """A checkpoint that is to be written.

    Attributes:
        path: The path of the checkpoint.
        nonce: The name of the folder of its files.
        plan: What this rank writes.
        values: The values of the pieces that it holds.
        random: The state of this rank's random number generators.
        content: What the manifest says beside the files and the fingerprint.
        training: The contents of training.pt beside the random numbers.
        files: The small files.
    """

    path: PathLike
    nonce: str
    plan: Plan
    values: Mapping[Piece, Tensor]
    random: dict[str, Any]
    content: dict[str, Any]
    training: dict[str, Any]
    files: Mapping[str, bytes]

    def write(self, values: Mapping[Piece, Tensor], group: dist.ProcessGroup | None) -> Exception | None:
        """Writes this rank's file, then completes the checkpoint on rank 0.

        Every rank must call it; the ranks meet once, after all have written.

        Args:
            values: The values of the pieces, perhaps copies.
            group: The group in which the ranks meet.

        Returns:
            On rank 0 the error of any rank, in which case nothing is left of the checkpoint.
        """
        mine: Any
        try:
            name = shards.file_name(collective.rank())
            mine = shards.write(storage(self.path).folder(self.nonce), name, self.plan, values)
        except Exception as error:
            mine = f"rank {collective.rank()}: {type(error).__name__}: {error}"
        try:
            every = collective.gather((mine, self.random), group)
            if collective.rank() != 0:
                return None
            if failed := [written for written, _ in every if isinstance(written, str)]:
                raise FileError(f"{self.path}: {failed[0]}")
            self._complete([written for written, _ in every], [random for _, random in every])
        except Exception as error:
            if collective.rank() == 0:
                folder.abandon(self.path, self.nonce)
            return error
        return None

    def _complete(self, written: list[shards.Written], random: list[dict[str, Any]]) -> None:
        """Writes what the ranks do not write, on rank 0, and the manifest."""
        where = storage(self.path).folder(self.nonce)
        files = {
            **self.files,
            indices.NAME: self.plan.index,
            folder.TRAINING: dumps({**self.training, "random": random}),
        }
        recorded = {name: folder.put(where, name, data) for name, data in files.items()}
        recorded |= {shards.file_name(rank): (one.bytes, one.checksum) for rank, one in enumerate(written)}
        sums: dict[str, int] = {}
        for names, one in zip(self.plan.owned, written):
            for name, share in zip(names, one.sums.tolist()):
                sums[name] = sums.get(name, 0) + share
        fingerprint = fingerprint_of(self.content, sums, self.training["scalars"]).total
        folder.finish(self.path, self.nonce, {**self.content, "fingerprint": fingerprint}, recorded)
