"""The contents of a checkpoint as tensors by name, the scalars of the optimizer's state, and other objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.layout import local


class Parts(NamedTuple):
    """What is written of a checkpoint's contents.

    Attributes:
        tensors: By name, those that the ranks write: `model.<name>` and `optimizer.state.<parameter>.<buffer>`.
        scalars: The 0-D buffers of the optimizer's state (`step`, and those of 0-D parameters), which are the same on
            every rank: one vector for each buffer and dtype, with the names of its parameters.
        objects: What is no tensor, by name.
    """

    tensors: dict[str, Tensor]
    scalars: list[dict[str, Any]]
    objects: dict[str, Any]


def split(contents: Mapping[str, Any]) -> Parts:
    """Splits the result of `Contents.saved`."""
    tensors, objects = dict[str, Tensor](), dict[str, Any]()
    shared: dict[tuple[str, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for path, holder in _places(contents):
        name, value = ".".join(path), holder[path[-1]]
        if not isinstance(value, Tensor):
            objects[name] = value
        elif _is_scalar(path, value):
            shared[path[-1], value.dtype][path[-2]] = local(value)
        else:
            tensors[name] = value
    packed = [
        {"buffer": buffer, "names": [*values], "values": torch.stack([*values.values()]).cpu()}
        for (buffer, _), values in shared.items()
    ]
    return Parts(tensors, packed, objects)


def scalars(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the 0-D buffers of the optimizer's state, by the names that format 1 has for them."""
    named = ((path, holder[path[-1]]) for path, holder in _places(contents))
    return {".".join(path): v for path, v in named if isinstance(v, Tensor) and _is_scalar(path, v)}


def fill_rest(contents: Mapping[str, Any], scalars: list[dict[str, Any]], objects: Mapping[str, Any]) -> None:
    """Sets the scalars and objects in the result of `Contents.to_fill`."""
    state = contents.get("optimizer", {}).get("state", {})
    for entry in scalars:
        for name, value in zip(entry["names"], entry["values"].unbind()):
            if entry["buffer"] in state.get(name, {}):
                local(state[name][entry["buffer"]]).copy_(value)
    for path, holder in [*_places(contents)]:
        if (name := ".".join(path)) in objects:
            holder[path[-1]] = objects[name]


def _is_scalar(path: tuple[str, ...], value: Tensor) -> bool:
    # Also a DTensor, which the state of a scalar parameter is where another run has a plain tensor.
    return path[0] == "optimizer" and value.ndim == 0


def _places(contents: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields the path of each value, and the dictionary that has it under the last name of the path."""
    model = contents["model"]
    yield from ((("model", name), model) for name in [*model])
    for param, buffers in contents.get("optimizer", {}).get("state", {}).items():
        yield from ((("optimizer", "state", param, buffer), buffers) for buffer in [*buffers])
