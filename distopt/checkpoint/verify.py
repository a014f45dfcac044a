"""Comparison of checkpoints with their checksums, by all ranks together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distopt import collective
from distopt.checkpoint import index as indices
from distopt.checkpoint import manifest
from distopt.checkpoint.folder import TRAINING, latest_checkpoint, open_checkpoint
from distopt.checkpoint.plain import loads
from distopt.checkpoint.shards import contents
from distopt.checkpoint.storage import PathLike, storage
from distopt.proof.checksum import Fingerprint


def damage(path: PathLike, content: Mapping[str, Any]) -> str | None:
    """Compares all files of a complete checkpoint with their checksums. Every rank must call it, and reads its share.

    Args:
        path: The checkpoint.
        content: Its manifest.

    Returns:
        On every rank, what is wrong with the first file that is damaged or cannot be read; None if all are intact.
    """
    names = sorted(content["files"])[collective.rank() :: collective.world()]
    try:
        collective.on_all(lambda: manifest.check_files(storage(path), content, names))
    except ValueError as error:
        return str(error)
    return None


def intact_checkpoint(folder: str | os.PathLike[str]) -> tuple[Any, list[str]]:
    """Finds the newest checkpoint whose files are all as they were written. Every rank must call it.

    Returns:
        As `latest_checkpoint`, with a line also for each newer checkpoint that is damaged.
    """
    damaged: dict[str, str] = {}
    while True:
        path, broken = collective.on_first(lambda: latest_checkpoint(folder, skip=damaged))
        lines = sorted([*broken, *damaged.values()], reverse=True)
        if path is None:
            return None, lines
        content = collective.on_first(lambda path=path: open_checkpoint(path))  # type: ignore[misc]
        reason = damage(path, content)
        if reason is None:
            return path, lines
        name = str(path).rpartition("/")[2]
        damaged[name] = f"{name}: {reason}"


def verify(path: PathLike) -> Fingerprint:
    """Checks a checkpoint completely, in one process: its manifest, the checksum of each file, the fingerprint.

    Returns:
        The fingerprint of its tensors, computed from the files: that of `distopt.fingerprint` for the model and the
        optimizer that were saved, unless DeepSpeed's 16-bit weights were saved from their float32 masters.

    Raises:
        ValueError: With what is wrong.
    """
    content = open_checkpoint(path)
    if reason := damage(path, content):
        raise ValueError(f"{path}: {reason}: the checkpoint is damaged, take another")
    files = manifest.files_of(storage(path), content)
    try:
        sums = {name: int(total) for name, total in contents(files, indices.read(files, content["format"]))}
        scalars = loads(files.read(TRAINING)).get("scalars", [])
    except Exception as error:  # of any class: format 1 has no checksums
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    found = fingerprint_of(content, sums, scalars)
    recorded = content.get("fingerprint")
    if recorded is not None and recorded != found.total:
        raise ValueError(f"{path}: the fingerprint of its tensors is {found.total}, the manifest says {recorded}")
    return found


def fingerprint_of(content: Mapping[str, Any], sums: Mapping[str, int], scalars: list[dict[str, Any]]) -> Fingerprint:
    """Returns the fingerprint of the tensors of a checkpoint.

    Args:
        content: Its manifest.
        sums: The hash of the content of each stored tensor, by the name in the files.
        scalars: Its `scalars`, as `contents.pack` makes them.
    """
    empty = f"{0:016x}"  # of a tensor without elements, which is in no file
    own = {name: f"{total % 2**64:016x}" for name, total in sums.items()}
    params = {name: own.get(f"model.{name}", empty) for name in content.get("fingerprinted", content["parameters"])}
    state: dict[str, dict[str, str]] = {}
    for name, buffers in content["state"].items():
        for buffer, description in buffers.items():
            if description and description[0]:
                state.setdefault(name, {})[buffer] = own.get(f"optimizer.state.{name}.{buffer}", empty)
    for entry in scalars:
        for name, value in zip(entry["names"], entry["values"].tolist()):
            state.setdefault(name, {})[entry["buffer"]] = repr(float(value))
    return Fingerprint(params, state)
