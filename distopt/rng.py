"""The random numbers that a pass draws, so that a second pass over the same batch draws the same ones."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators: Python's, torch's, those of GPUs, and NumPy's where it has been imported.

    A generator that a program has made for itself (`numpy.random.default_rng`, `torch.Generator`) is none of them.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    gpus: dict[torch.device, Tensor]


def random_state(*devices: torch.device) -> RandomState:
    """Returns the state of the generators now.

    Args:
        devices: those that a pass draws on. The CPU is always one of them.
    """
    numpy = sys.modules.get("numpy")  # not imported for this: distopt needs torch alone
    return RandomState(
        python=random.getstate(),
        numpy=None if numpy is None else numpy.random.get_state(),
        cpu=torch.get_rng_state(),
        gpus={device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"},
    )


def set_random_state(state: RandomState) -> None:
    """Sets the generators back to what `random_state` returned."""
    random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    for device, gpu in state.gpus.items():
        torch.cuda.set_rng_state(gpu, device)


def saved_random_state() -> dict[str, Any]:
    """Returns the state of the generators, of the current GPU among them, in the form that a checkpoint keeps."""
    gpus = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    state = random_state(*gpus)
    numpy = state.numpy
    if isinstance(numpy, tuple):  # MT19937: a list of its key, so that a process without NumPy can read the checkpoint
        numpy = (numpy[0], numpy[1].tolist(), *numpy[2:])
    return {"cpu": state.cpu, "cuda": state.gpus[gpus[0]] if gpus else None, "python": state.python, "numpy": numpy}


def resume_random_state(saved: Mapping[str, Any]) -> None:
    """Sets the generators to what `saved_random_state` returned.

    Args:
        saved: A state without `python` and `numpy` (a checkpoint of distopt before it kept them) leaves these
            generators alone, as does one of NumPy or of a GPU in a process that has none.
    """
    gpu = saved["cuda"] if torch.cuda.is_available() else None
    with contextlib.suppress(ImportError):
        if saved.get("numpy") is not None:
            importlib.import_module("numpy").random.set_state(saved["numpy"])
    if saved.get("python") is not None:
        random.setstate(saved["python"])
    torch.set_rng_state(saved["cpu"])
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


@contextlib.contextmanager
def same_random_numbers(start: RandomState) -> Iterator[None]:
    """A block which draws what was drawn since `start`; after it the generators are as if it had drawn nothing.

    start = random_state(device)
    first_pass()
    with same_random_numbers(start):
        second_pass()
    """
    after = random_state(*start.gpus)
    set_random_state(start)
    try:
        yield
    finally:
        set_random_state(after)
