"""The folders of checkpoints: how one gets its name, which is the newest, which go."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distopt.checkpoint import manifest

TRAINING = "training.pt"
_STEP = re.compile(r"(step_(\d+))(\.tmp|\.old)?")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """The name under which `latest_checkpoint` finds the checkpoint of a step: folder/step_00000200."""
    return Path(folder) / f"step_{step:08d}"


def latest_checkpoint(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a folder, and one line for each newer one that is broken, newest first.

    The newest is the one of the highest step in the names that `checkpoint_path` gives. Complete means that its
    manifest can be read and that every file has the size it says; contents are not compared. What a save has half
    written (`.tmp`), because it was killed or still writes, is a broken one too, unless there is an older version of
    it. None where there is no complete checkpoint, or no such folder.

    It only looks at the file system, which two ranks may see in different states: call it on rank 0 and broadcast.
    """
    broken: list[str] = []
    for path in _newest_first(Path(folder)):
        versions = _versions(path)
        if not versions:
            broken.append(f"{half_written(path).name}: it was not written to its end")
        for version in versions:
            reason = _problem(version)
            if reason is None:
                return version, broken
            broken.append(f"{version.name}: {reason}")
    return None, broken


def open_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a complete checkpoint and its manifest; raises ValueError for any other."""
    folder = next(iter(_versions(path)), path)
    try:
        return folder, manifest.read(folder)
    except ValueError as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {error}") from error


def half_written(path: Path) -> Path:
    """Where a checkpoint is written; the same name on every rank, without asking the others."""
    return _beside(path, ".tmp")


def begin(path: Path) -> None:
    """Makes the empty folder in which a checkpoint is written.

    Raises ValueError if something that is no checkpoint has its name, which replacing would delete.
    """
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} exists and is not a checkpoint: choose another name")
    remove(half_written(path))
    half_written(path).mkdir(parents=True)


def finish(path: Path, training: Mapping[str, Any], content: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Completes what has been half written and gives it its name; a checkpoint of that name goes after that.

    A folder cannot be renamed over another one in one go, so for a moment the former is `.old`, where readers look too.
    """
    half, old = half_written(path), _beside(path, ".old")
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
        remove(path)  # an old one may be the only complete one, and stays until the new one has its name
    os.rename(half, path)
    _sync(path.parent)
    remove(old)


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` complete checkpoints, and what is half written or replaced."""
    complete = 0
    for path in _newest_first(folder):
        remove(half_written(path))
        if complete == keep:
            remove(path)
        if complete == keep or _problem(path) is None:
            remove(_beside(path, ".old"))
        complete = min(keep, complete + any(_problem(version) is None for version in _versions(path)))


def remove(path: Path) -> None:
    """Removes a checkpoint's folder if it is there; warns where that fails, which is no reason to end a training."""
    if not path.exists():
        return
    try:
        if not _is_ours(path):
            raise OSError("it is not a checkpoint")
        shutil.rmtree(path)  # with one file less it is not complete any more
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error}", RuntimeWarning, stacklevel=2)


def _versions(path: Path) -> list[Path]:
    """What there is of a checkpoint: the folder of its name, then the one that a killed `finish` has put aside."""
    return [version for version in (path, _beside(path, ".old")) if version.exists()]


def _problem(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint; None if it is one."""
    try:
        manifest.read(path)
    except ValueError as error:
        return str(error)
    return None


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints that have left any trace, by their final names."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {match[1]: int(match[2]) for match in map(_STEP.fullmatch, names) if match}
    return [folder / name for name in sorted(found, key=lambda name: (found[name], name), reverse=True)]


def _is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not, or empty."""
    if not path.is_dir():
        return False
    names = os.listdir(path)
    own = {manifest.NAME, TRAINING, ".metadata"}
    return not names or any(name in own or name.endswith(".distcp") for name in names)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
