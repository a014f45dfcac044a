"""The state of the random number generators: for SAM's second pass over a batch, and for checkpoints."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators. Generators that a program creates itself (`numpy.random.default_rng`,
    `torch.Generator`) are not included.

    Attributes:
        python: That of `random`; None to leave that generator alone.
        numpy: That of `numpy.random`; None to leave that generator alone, or if NumPy was not imported.
        cpu: torch's on the CPU, a uint8 tensor.
        gpus: torch's on GPUs, uint8 tensors in host memory, by device.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    gpus: dict[torch.device, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a checkpoint stores it, without the index of the GPU (at most one)."""
        return {
            "python": self.python,
            "numpy": self.numpy,
            "cpu": self.cpu,
            "cuda": next(iter(self.gpus.values()), None),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RandomState:
        """Returns the state that a checkpoint stores, for this process's GPU.

        Args:
            state: The result of `state_dict`; those of earlier versions lack Python's and NumPy's states.
        """
        gpus = {device: state["cuda"] for device in current_gpu() if state["cuda"] is not None}
        numpy = state.get("numpy")
        if numpy is not None:  # a checkpoint has tensors in place of NumPy's arrays
            numpy = tuple(part.numpy().astype("uint32") if isinstance(part, Tensor) else part for part in numpy)
        return cls(state.get("python"), numpy, state["cpu"], gpus)


def current_gpu() -> tuple[torch.device, ...]:
    """Returns this process's GPU, or nothing where there is none."""
    return (torch.device("cuda", torch.cuda.current_device()),) if torch.cuda.is_available() else ()


def random_state(*devices: torch.device) -> RandomState:
    """Returns the current state of the generators.

    Args:
        devices: The devices on which random numbers are drawn. The CPU is always included.
    """
    numpy = sys.modules.get("numpy")  # not imported for this: distopt needs torch alone
    return RandomState(
        python=random.getstate(),
        numpy=None if numpy is None else numpy.random.get_state(),
        cpu=torch.get_rng_state(),
        gpus={device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"},
    )


def set_random_state(state: RandomState) -> None:
    """Restores the generators to a state that `random_state` returned."""
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        import numpy  # a checkpoint's state, where this program has not imported it yet

        numpy.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    for device, gpu in state.gpus.items():
        torch.cuda.set_rng_state(gpu, device)


@contextlib.contextmanager
def same_random_numbers(start: RandomState) -> Iterator[None]:
    """Repeats, inside of the block, the random numbers drawn since `start`; afterwards the generators are as before it.

        start = random_state(device)
        first_pass()
        with same_random_numbers(start):
            second_pass()

    Args:
        start: The state before the first pass.
    """
    after = random_state(*start.gpus)
    set_random_state(start)
    try:
        yield
    finally:
        set_random_state(after)
