"""Objects of a checkpoint that are no tensors of the model: written by torch.save, and read without running code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch


def plain(value: Any) -> Any:
    """Returns a copy that consists of dictionaries, lists, tuples, numbers, text and tensors where it can.

    NumPy's arrays become tensors, and its scalars numbers, since `torch.load(weights_only=True)` refuses both.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if type(value).__module__ == "numpy":
        if value.ndim == 0:
            return value.item()
        # torch 2.13 does not unpickle uint16, uint32 and uint64.
        return torch.from_numpy(
            value.astype("int64") if value.dtype.kind == "u" and value.itemsize > 1 else value.copy()
        )
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def checked(value: Any, what: str) -> Any:
    """Returns `plain` of an object that comes back when it is saved and loaded.

    Args:
        value: The object.
        what: Its description, for the error.

    Raises:
        ValueError: If it contains an object that cannot be loaded without running code.
    """
    value = plain(value)
    try:
        loads(dumps(value))
    except Exception as error:  # also of what an object's own methods raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{what} cannot be saved, since it would run code when it is loaded ({reason}): let it consist of numbers, "
            "text, tensors, lists and dictionaries"
        ) from error
    return value


def dumps(value: Any) -> bytes:
    """Returns the bytes of an object."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def loads(data: bytes) -> Any:
    """Returns an object of its bytes, by torch's unpickler that knows numbers, text, tensors and containers alone."""
    with torch.serialization.safe_globals(_numpy()):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _numpy() -> list[Any]:
    """What the arrays in training.pt of format 1 are made of: NumPy's random numbers."""
    import sys

    numpy = sys.modules.get("numpy")
    if numpy is None:
        return []
    core = getattr(numpy, "_core", None) or numpy.core
    return [core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32"))]
