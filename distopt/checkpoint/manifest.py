"""The manifest of a checkpoint: a description of its contents, and the comparison with a model and an optimizer."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from distopt.checkpoint.average import is_optional
from distopt.checkpoint.shards import checksum
from distopt.checkpoint.storage import Storage
from distopt.kernels.blocks import CODES, buffer_of, is_of_blocks
from distopt.kernels.rounding import BESIDE

# The version of the format of the folder, not of distopt. Format 1, which is read too, has its tensors as torch's
# distributed checkpoints (DCP) have them, its files beside the manifest, and no checksums.
FORMAT = 2
NAME = "manifest.json"
_PLAIN = re.compile(r"\.metadata|\w[\w.-]*", re.ASCII)
_KEYS = ("extra", "optimizer", "parameters", "schedule", "state", "world_size")


def described(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the full shape and the dtype of every tensor, by name; null for other values."""
    return {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")] if isinstance(value, Tensor) else None
        for name, value in values.items()
    }


def checked(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a dictionary; raises ValueError if it does not survive JSON."""
    extra = dict(extra)
    try:
        same = json.loads(json.dumps(extra)) == extra
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be for JSON: {error}; got {extra}") from error
    if not same:
        raise ValueError(f"extra must be the same after JSON (keys are strings, no tuples, no nan), got {extra}")
    return extra


def write(storage: Storage, folder: str, content: Mapping[str, Any], files: Mapping[str, Sequence[int]]) -> None:
    """Completes a checkpoint by its manifest, which replaces that of an earlier one at once.

    Args:
        storage: The checkpoint.
        folder: The name of the folder of its files.
        content: The description of its contents.
        files: The size in bytes and the CRC-32 of each file, by name.
    """
    content = {"format": FORMAT, **content, "folder": folder, "files": dict(sorted(files.items()))}
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    text = ("{\n" + ",\n".join(rows) + ",\n").encode()
    storage.replace(NAME, text + _ending(text))


def read(storage: Storage) -> dict[str, Any]:
    """Reads the manifest of a complete checkpoint, all of whose files have the recorded size.

    Contents are not compared with their checksums, except the manifest itself: `check_files` does.

    Raises:
        ValueError: With the reason in one line, if the checkpoint is not complete.
    """
    if not storage.is_folder():
        raise ValueError("there is no such folder")
    try:
        manifest = _parsed(storage.read(NAME))
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}, so it was not written to its end") from None
    except Exception as error:  # of any class, by what the bytes happen to say
        raise ValueError(f"its {NAME} cannot be read: {error!r}") from error
    inner = files_of(storage, manifest)
    for name, (size, *_) in manifest["files"].items():
        try:
            found = inner.size(name)
        except Exception as error:  # of any class, by the file system
            raise ValueError(f"{name} cannot be read: {error!r}") from error
        if found is None:
            raise ValueError(f"{name} is missing")
        if found != size:
            raise ValueError(f"{name} is {found} bytes, the manifest says {size}")
    return manifest


def files_of(storage: Storage, manifest: Mapping[str, Any]) -> Storage:
    """Returns the folder of a checkpoint's files: that of the manifest itself in format 1."""
    return storage.folder(manifest["folder"]) if manifest["folder"] else storage


def check_files(storage: Storage, manifest: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Compares files with their checksums.

    Args:
        storage: The checkpoint.
        manifest: Its manifest.
        names: The names of the files; None for all.

    Raises:
        ValueError: For the first file that differs or cannot be read, whatever the error, naming it. Format 1 has no
            checksums, and only what cannot be read is found.
    """
    inner = files_of(storage, manifest)
    for name in manifest["files"] if names is None else names:
        size, *recorded = manifest["files"][name]
        try:
            found = list(checksum(inner, name))
        except Exception as error:  # of any class, by the file system
            raise ValueError(f"{name} cannot be read: {error!r}") from error
        if found[: 1 + len(recorded)] != [size, *recorded]:
            raise ValueError(f"{name} is not as it was written")


def _parsed(data: bytes) -> dict[str, Any]:
    """Returns a manifest with `files` as lists and `folder`, after a check of its own checksum.

    Raises:
        Exception: Of any class, if the bytes are not those of a manifest.
    """
    manifest: dict[str, Any] = json.loads(data)
    version = manifest["format"]
    if version == 1:
        manifest["files"] = {name: [size] for name, size in manifest["files"].items()}
        manifest["folder"] = ""
    elif version == FORMAT:
        text = data[: data.rindex(b'"checksum"')]
        if data[len(text) :] != _ending(text):
            raise ValueError("it has changed since it was written")
        del manifest["checksum"]
    else:
        raise ValueError(f"it has format {version}, this version of distopt reads {FORMAT}")
    for name in [*manifest["files"], *filter(None, [manifest["folder"]])]:
        if not _PLAIN.fullmatch(name):  # it is joined to a path
            raise ValueError(f"{name!r} is no plain name of a file")
    if missing := [key for key in _KEYS if key not in manifest]:
        raise ValueError(f"it has no {missing[0]}")
    return manifest


def _ending(text: bytes) -> bytes:
    return f'"checksum": "{zlib.crc32(text):08x}"\n}}\n'.encode()


def check_model(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ValueError for the first tensor, in the order of the model, that is missing or differs on one side."""
    for name in [*ours, *saved]:
        if name not in saved:
            raise ValueError(f"{name} is in the model, not in the checkpoint")
        if name not in ours:
            raise ValueError(f"{name} is in the checkpoint, not in the model")
        there, here = saved[name], ours[name]
        if there != here:
            if there and here and there[0] != here[0]:
                there, here = there[0], here[0]
            elif there and here:
                there, here = there[1], here[1]
            raise ValueError(f"{name} is {there} in the checkpoint, {here} in the model")


def check_optimizer(saved: Mapping[str, Any], kind: str, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError unless a checkpoint is of this class of optimizer and has the same state buffers.

    Only parameters with state on both sides are compared, since one that is frozen has none before its first step. What
    stands beside 16-bit weights may differ, and the form of the moments (`state_bits`), since each form can be made
    from another, or from the weights; and so may averages of the weights and SAM's buffers, which begin anew.
    """
    both = [name for name, buffers in state.items() if buffers and saved["state"].get(name)]
    there, here = (
        sorted({buffer_of(buffer) for name in both for buffer in of[name]}) for of in (saved["state"], state)
    )
    differ = {name for name in set(there) ^ set(here) if name not in BESIDE and not is_optional(name)}
    if saved["optimizer"] != kind or differ:
        states = [", ".join(buffers) or "none" for buffers in (there, here)]
        raise ValueError(
            f"the checkpoint is of {saved['optimizer']} (state: {states[0]}), this run has {kind} (state: {states[1]})"
        )


def check_state(saved: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError for the first parameter whose saved state lacks a buffer or has one of another shape.

    Parameters without any state on either side are not compared; nor are dtypes, since loading casts.

    Args:
        saved: The description of each buffer in the checkpoint, by the names of parameter and buffer.
        ours: Those of this run.
    """
    for name, buffers in ours.items():
        there = saved.get(name, {})
        for buffer, description in buffers.items() if there else ():
            if buffer not in there:
                other = buffer_of(buffer)
                if buffer in BESIDE or is_optional(buffer) or other in there or other + CODES in there:
                    continue
                raise ValueError(f"the state of {name} has no {buffer} in the checkpoint, only {', '.join(there)}")
            if is_of_blocks(buffer):  # of 8 bits or of 4
                continue
            shapes = [None if each is None else each[0] for each in (there[buffer], description)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{buffer} of {name} is {shapes[0]} in the checkpoint, {shapes[1]} in the optimizer")


def check_groups(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """Raises ValueError unless the param groups have the same parameters."""
    if len(saved) != len(ours):
        raise ValueError(f"the checkpoint has {len(saved)} param groups, the optimizer {len(ours)}")
    for i, (there, here) in enumerate(zip(saved, ours)):
        if differ := sorted(set(there["params"]) ^ set(here["params"])):
            where = "checkpoint" if differ[0] in there["params"] else "optimizer"
            raise ValueError(f"{differ[0]} is in param group {i} of the {where} only")


def regrouped(saved: list[dict[str, Any]], ours: list[dict[str, Any]], state: Iterable[str]) -> list[dict[str, Any]]:
    """Returns our param groups, with what is state in those of the checkpoint that have the same parameters.

    Args:
        saved: The param groups of the checkpoint, which may divide the parameters in another way.
        ours: Those of the optimizer, with their own hyper-parameters.
        state: The names of what is state in a group: counts, and running sums.

    Raises:
        ValueError: For other parameters, and for a group that joins groups of the checkpoint whose state differs.
    """
    origin = {name: group for group in saved for name in group["params"]}
    if differ := sorted(origin.keys() ^ {name for group in ours for name in group["params"]}):
        where = "checkpoint" if differ[0] in origin else "optimizer"
        raise ValueError(f"{differ[0]} is in a param group of the {where} only")
    found = []
    for i, group in enumerate(ours):
        joined = [{key: origin[name][key] for key in state if key in origin[name]} for name in group["params"]]
        if differing := [other for other in joined if other != joined[0]]:
            raise ValueError(
                f"param group {i} joins groups of the checkpoint that differ in their state, {joined[0]} and "
                f"{differing[0]}: leave them apart"
            )
        found.append({**group, **(joined[0] if joined else {})})
    return found


def check_schedule(saved: str | None, ours: str | None) -> None:
    """Raises ValueError if a schedule is to be loaded and the checkpoint has none of this class."""
    if ours is not None and saved != ours:
        raise ValueError(f"the checkpoint has {saved or 'no schedule'}, this run has {ours}")
