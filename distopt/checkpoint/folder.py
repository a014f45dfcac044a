"""The folders of checkpoints: their names, and the newest complete one.

    step_00000200/manifest.json          written last, at once: without it there is no checkpoint
    step_00000200/<nonce>/index.json     where each piece of each tensor is
                          shard-00000.bin, shard-00001.bin, ...      one of each rank
                          training.pt    param groups, schedule, random numbers
                          config.json, tokenizer.json, ...           small files, for `distopt.export`

A save over an earlier checkpoint writes into a folder of a new name, so that the earlier one stays complete until the
new manifest replaces its own. Nothing is renamed, since object stores cannot.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distopt.checkpoint import index as indices
from distopt.checkpoint import manifest
from distopt.checkpoint.storage import PathLike, Storage, is_url, join, storage

TRAINING = "training.pt"
_STEP = re.compile(r"(step_(\d+))(\.tmp|\.old)?")  # with what killed saves of format 1 have left
_NONCE = re.compile(r"[0-9a-f]{8}")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Any:
    """Returns the path at which `latest_checkpoint` finds the checkpoint of a step: folder/step_00000200.

    It is text for a URL, and a Path otherwise.
    """
    return join(folder, f"step_{step:08d}")


def latest_checkpoint(folder: str | os.PathLike[str], skip: Collection[str] = ()) -> tuple[Any, list[str]]:
    """Finds the newest complete checkpoint in a folder.

    The newest is that of the highest step in a name given by `checkpoint_path`. A checkpoint is complete if its
    manifest can be read and every file has the recorded size; contents are not compared: `intact_checkpoint` does.

    Two ranks may see the file system in different states: call this on rank 0 and broadcast the result.

    Args:
        folder: A local folder, or a URL of fsspec.
        skip: Names of checkpoints to pass over, without a line.

    Returns:
        The path, or None without a complete checkpoint or without the folder; and one line for each newer checkpoint
        that is broken, newest first.
    """
    broken: list[str] = []
    for name in newest_first(folder):
        if name in skip:
            continue
        reason = problem(storage(join(folder, name)))
        if reason is None:
            return join(folder, name), broken
        broken.append(f"{name}: {reason}")
    return None, broken


def newest_checkpoint(path: Path) -> Path:
    """Returns the newest complete checkpoint of a run or a folder of checkpoints, and any other path as it is.

    Raises:
        ValueError: A run has no complete checkpoint.
    """
    for folder in (path / "checkpoints", path):
        newest, broken = latest_checkpoint(folder)
        if newest is not None:
            for line in broken:
                print(f"distopt: passed over {line}", file=sys.stderr)
            return newest
        if broken or (folder != path and folder.is_dir()):
            raise ValueError(f"{folder} has no complete checkpoint: {broken[0] if broken else 'it is empty'}")
    return path


def open_checkpoint(path: PathLike) -> dict[str, Any]:
    """Returns the manifest of a complete checkpoint; raises ValueError if it is not complete."""
    try:
        return manifest.read(storage(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error


def small_files(path: PathLike) -> dict[str, bytes]:
    """Returns the files that were given to `save_checkpoint`, by name, after a comparison with their checksums.

    Raises:
        ValueError: If the checkpoint is not complete, or one of them is damaged.
    """
    content = open_checkpoint(path)
    files = manifest.files_of(storage(path), content)
    own = (TRAINING, indices.NAME, indices.DCP_METADATA)
    names = [name for name in content["files"] if name not in own and not name.endswith((".bin", ".distcp"))]
    try:
        manifest.check_files(storage(path), content, names)
        return {name: files.read(name) for name in names}
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def begin(path: PathLike) -> str:
    """Creates the folder into which the files of a checkpoint are written; returns its name.

    Raises:
        ValueError: If `path` exists and is not a checkpoint, since replacing it would delete it.
    """
    where, nonce = storage(path), uuid.uuid4().hex[:8]
    if where.exists() and not _is_ours(where):
        raise ValueError(f"{path} exists and is not a checkpoint: choose another name")
    where.folder(nonce).make()
    return nonce


def put(where: Storage, name: str, data: bytes) -> tuple[int, int]:
    """Writes a small file; returns its size and its CRC-32."""
    with where.create(name) as file:
        file.write(data)
    return len(data), zlib.crc32(data)


def finish(path: PathLike, nonce: str, content: Mapping[str, Any], files: Mapping[str, tuple[int, int]]) -> None:
    """Completes a checkpoint by its manifest, then removes the files of an earlier one of this name."""
    where = storage(path)
    where.folder(nonce).sync()
    where.sync()
    manifest.write(where, nonce, content, files)
    if not is_url(path):
        storage(Path(path).absolute().parent).sync()
    for name in where.names():
        if name not in (nonce, manifest.NAME):
            remove(where, name)


def abandon(path: PathLike, nonce: str) -> None:
    """Removes what a failed save has written, since a full disk needs the space; nothing if it came to its manifest."""
    where = storage(path)
    with contextlib.suppress(ValueError):
        if manifest.read(where)["folder"] == nonce:
            return
    remove(where, nonce)
    if where.is_folder() and not where.names():
        remove(where)


def remove(where: Storage, name: str = "") -> None:
    """Removes the folder of a checkpoint, or a name in it; warns on failure, which is no reason to end a run."""
    try:
        if not _is_ours(where):
            raise OSError("it is not a checkpoint")
        if not name and manifest.NAME in where.names():
            where.remove(manifest.NAME)  # from here on it is no longer complete
        where.remove(name)
    except OSError as error:
        warnings.warn(f"{where.path} could not be removed: {error}", RuntimeWarning, stacklevel=2)


def problem(where: Storage) -> str | None:
    """Returns the reason why a folder is not a complete checkpoint; None if it is complete."""
    try:
        manifest.read(where)
    except ValueError as error:
        return str(error)
    return None


def newest_first(folder: PathLike) -> list[str]:
    """Returns the names of all checkpoints, complete or not."""
    found = {match[0]: int(match[2]) for match in map(_STEP.fullmatch, storage(folder).names()) if match}
    return sorted(found, key=lambda name: (found[name], name), reverse=True)


def step_of(name: str) -> int | None:
    """Returns the step of a name given by `checkpoint_path`; None for what a killed save of format 1 has left."""
    match = _STEP.fullmatch(name)
    return int(match[2]) if match and not match[3] else None


def _is_ours(where: Storage) -> bool:
    """Returns whether this is the folder of a checkpoint, complete or not, or an empty folder."""
    if not where.is_folder():
        return False
    names = where.names()
    own = {manifest.NAME, TRAINING, indices.DCP_METADATA}
    return not names or any(name in own or _NONCE.fullmatch(name) or name.endswith(".distcp") for name in names)
