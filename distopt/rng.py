"""The random numbers that a pass draws, so that a second pass over the same batch draws the same ones."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def same_random_numbers(start: RandomState) -> Iterator[None]:
    """A block which draws what was drawn since `start`; after it the generators are as if it had drawn nothing.

    start = random_state(device)
    needs_ascent_gradient()
    with same_random_numbers(start):
        second_pass()
    """
    after = random_state(*start.gpus)
    set_random_state(start)
    try:
        yield
    finally:
        set_random_state(after)
