"""The manifest of a checkpoint: a description of its contents, and the comparison with a model and an optimizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# The version of the format of the folder, not of distopt.
FORMAT = 1
NAME = "manifest.json"


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


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Completes a folder with its manifest: the content, and the size in bytes of every file."""
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    content = {"format": FORMAT, **content, "files": files}
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    with open(folder / NAME, "w") as file:
        file.write("{\n" + ",\n".join(rows) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a complete checkpoint, in which every file has the recorded size.

    Raises:
        ValueError: With the reason in one line, if the checkpoint is not complete.
    """
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    try:
        manifest = json.loads((folder / NAME).read_text())
        version, files = manifest["format"], manifest["files"]
        found = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in files}
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}, so it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {NAME} cannot be read: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"it has format {version}, this version of distopt reads {FORMAT}")
    for name, size in files.items():
        if found[name] is None:
            raise ValueError(f"{name} is missing")
        if found[name] != size:
            raise ValueError(f"{name} is {found[name]} bytes, the manifest says {size}")
    return manifest


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

    Float32 masters may be missing, since they can be made from the weights.
    """
    there, here = (
        sorted({buffer for buffers in states.values() for buffer in buffers}) for states in (saved["state"], state)
    )
    # torch's optimizers have no state before their first step, so that an empty state says nothing.
    differ = set(there) ^ set(here) - ({"master"} - set(there))
    if saved["optimizer"] != kind or (there and here and differ):
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
                if buffer == "master":
                    continue
                raise ValueError(f"the state of {name} has no {buffer} in the checkpoint, only {', '.join(there)}")
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


def check_schedule(saved: str | None, ours: str | None) -> None:
    """Raises ValueError if a schedule is to be loaded and the checkpoint has none of this class."""
    if ours is not None and saved != ours:
        raise ValueError(f"the checkpoint has {saved or 'no schedule'}, this run has {ours}")
