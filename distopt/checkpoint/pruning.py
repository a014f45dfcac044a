"""Which checkpoints of a run stay, and the removal of the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distopt import collective
from distopt.bounds import integer, is_number, or_null
from distopt.checkpoint import manifest
from distopt.checkpoint.folder import newest_first, problem, remove, step_of
from distopt.checkpoint.storage import is_url, join, storage


def best_checkpoint(folder: str | os.PathLike[str], metric: str) -> Any:
    """Finds the complete checkpoint with the least value of a number in its `extra`, the first one of equals.

    Call it on rank 0, as `latest_checkpoint`.

    Args:
        folder: A local folder, or a URL of fsspec.
        metric: The name of the number, such as `validation_loss`. Checkpoints without it, or whose value is not
            finite, are passed over.

    Returns:
        The path; None if no complete checkpoint has the number.
    """
    values: dict[str, float] = {}
    for name in reversed(newest_first(folder)):
        try:
            value = dict(manifest.read(storage(join(folder, name)))["extra"]).get(metric)
        except (ValueError, TypeError):
            continue
        if step_of(name) is not None and value is not None and is_number(value):
            values[name] = value
    return join(folder, min(values, key=values.__getitem__)) if values else None


def prune_checkpoints(
    folder: str | os.PathLike[str], keep: int, *, keep_every: int | None = None, best: str | None = None
) -> None:
    """Removes checkpoints but for the newest ones and those that stay, and the remains of killed saves.

    Only rank 0 removes. Checkpoints newer than the oldest that is kept stay even if they are damaged, unless they have
    no manifest. A folder that cannot be removed causes a warning.

    Args:
        folder: A local folder, or a URL of fsspec.
        keep: The number of complete checkpoints to keep, the newest ones, beside those that stay by the options below.
        keep_every: Checkpoints whose step is a multiple of this stay for good.
        best: The name of a number in `extra`; the checkpoint that `best_checkpoint` finds by it stays.

    Raises:
        ValueError: If `keep` is not an integer >= 1, or `keep_every` neither that nor None.
    """
    integer(1).check("keep", keep, "to keep all, do not prune")
    or_null(integer(1)).check("keep_every", keep_every)
    if collective.rank() != 0:
        return
    found = None if best is None else best_checkpoint(folder, best)
    complete = 0
    for name in newest_first(folder):
        where, step = storage(join(folder, name)), step_of(name)
        if manifest.NAME not in where.names():
            remove(where)
        elif join(folder, name) == found or (keep_every and step is not None and step % keep_every == 0):
            continue
        elif complete == keep:
            remove(where)
        elif problem(where) is None:
            complete += 1


def link_best(folder: Path, metric: str) -> None:
    """Points the link `best` in a folder to its best checkpoint, if there is one. Only rank 0 does."""
    found = best_checkpoint(folder, metric) if collective.rank() == 0 and not is_url(folder) else None
    if found is not None:
        new = folder / ".best.new"
        new.unlink(missing_ok=True)
        new.symlink_to(found.name)
        new.replace(folder / "best")
