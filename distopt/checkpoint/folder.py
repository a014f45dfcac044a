"""The folders of checkpoints: their names, the newest complete one, and pruning."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distopt import collective
from distopt.bounds import integer
from distopt.checkpoint import manifest

TRAINING = "training.pt"
_STEP = re.compile(r"(step_(\d+))(\.tmp|\.old)?")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Returns the path at which `latest_checkpoint` finds the checkpoint of a step: folder/step_00000200."""
    return Path(folder) / f"step_{step:08d}"


def latest_checkpoint(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Finds the newest complete checkpoint in a folder.

    The newest is that of the highest step in a name given by `checkpoint_path`. A checkpoint is complete if its
    manifest can be read and every file has the recorded size; contents are not compared. An unfinished one (`.tmp`),
    whose save was killed or is still running, counts as broken, unless an older version of it exists.

    Two ranks may see the file system in different states: call this on rank 0 and broadcast the result.

    Returns:
        The path, or None without a complete checkpoint or without the folder; and one line for each newer checkpoint
        that is broken, newest first.
    """
    broken: list[str] = []
    for path in _newest_first(Path(folder)):
        versions = _versions(path)
        if not versions:
            broken.append(f"{unfinished(path).name}: it was not written to its end")
        for version in versions:
            reason = _problem(version)
            if reason is None:
                return version, broken
            broken.append(f"{version.name}: {reason}")
    return None, broken


def open_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a complete checkpoint and its manifest; raises ValueError if it is not complete."""
    folder = next(iter(_versions(path)), path)
    try:
        return folder, manifest.read(folder)
    except ValueError as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {error}") from error


def unfinished(path: Path) -> Path:
    """The folder in which a checkpoint is written; the same name on every rank, without communication."""
    return _sibling(path, ".tmp")


def begin(path: Path) -> None:
    """Creates the empty folder in which a checkpoint is written.

    Raises:
        ValueError: If `path` exists and is not a checkpoint, since replacing it would delete it.
    """
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} exists and is not a checkpoint: choose another name")
    remove(unfinished(path))
    unfinished(path).mkdir(parents=True)


def finish(path: Path, training: Mapping[str, Any], content: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Completes an unfinished checkpoint and renames it to `path`, then removes an earlier one of that name.

    A folder cannot atomically replace another one, so for a moment the earlier one is `.old`, which readers look at
    too.
    """
    half, old = unfinished(path), _sibling(path, ".old")
    for name, data in files.items():
        with open(half / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    with open(half / TRAINING, "wb") as file:
        torch.save(dict(training), file)
        file.flush()
        os.fsync(file.fileno())
    manifest.write(half, content)
    _sync(half)
    if _problem(path) is None:
        remove(old)
        os.rename(path, old)
    else:
        remove(path)  # `.old` may be the only complete version, and stays until the new one is renamed
    os.rename(half, path)
    _sync(path.parent)
    remove(old)


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Removes all but the newest `keep` complete checkpoints, and the remains of killed saves. Only rank 0 removes.

    Checkpoints newer than the oldest that is kept stay even if they are broken. A folder that cannot be removed causes
    a warning.

    Raises:
        ValueError: If `keep` is not an integer >= 1.
    """
    integer(1).check("keep", keep, "to keep all, do not prune")
    if collective.rank() != 0:
        return
    complete = 0
    for path in _newest_first(Path(folder)):
        remove(unfinished(path))
        if complete == keep:
            remove(path)
        if complete == keep or _problem(path) is None:
            remove(_sibling(path, ".old"))
        complete = min(keep, complete + any(_problem(version) is None for version in _versions(path)))


def remove(path: Path) -> None:
    """Removes the folder of a checkpoint if it exists; warns on failure, which is no reason to end a run."""
    if not path.exists():
        return
    try:
        if not _is_ours(path):
            raise OSError("it is not a checkpoint")
        shutil.rmtree(path)  # from the first removed file on, it is no longer complete
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error}", RuntimeWarning, stacklevel=2)


def _versions(path: Path) -> list[Path]:
    """The existing versions of a checkpoint: its own folder, then the one that a killed `finish` set aside."""
    return [version for version in (path, _sibling(path, ".old")) if version.exists()]


def _problem(path: Path) -> str | None:
    """The reason why a folder is not a complete checkpoint; None if it is complete."""
    try:
        manifest.read(path)
    except ValueError as error:
        return str(error)
    return None


def _newest_first(folder: Path) -> list[Path]:
    """The paths of all checkpoints of which any version exists, complete or not."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {match[1]: int(match[2]) for match in map(_STEP.fullmatch, names) if match}
    return [folder / name for name in sorted(found, key=lambda name: (found[name], name), reverse=True)]


def _is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint, complete or not, or an empty folder."""
    if not path.is_dir():
        return False
    names = os.listdir(path)
    own = {manifest.NAME, TRAINING, ".metadata"}
    return not names or any(name in own or name.endswith(".distcp") for name in names)


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync(folder: Path) -> None:
    """Makes the entries of a folder durable, as fsync does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
