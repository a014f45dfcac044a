"""`torch.compile` of each block of a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def check_compiler() -> None:
    """Raises ValueError where torch.compile has no C++ compiler, without which its default backend fails late."""
    wanted = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"engine.compile=true needs a C++ compiler, and there is none of {', '.join(wanted)} on the PATH: install "
            "g++, or set it to false"
        )


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compiles the forward pass of each block in place, for training alone.

    Equal blocks share what is compiled. The hooks of a block, by which FSDP2 gathers it and ZeRO-1 waits for it, run
    around the compiled code, and not inside of it. Validation and sampling, whose shapes vary, are not compiled.

    Call it when the blocks are wrapped: `fully_shard` gives them other classes, whose forward pass checkpoints
    activations.
    """
    for block in blocks:
        block.forward = _in_training(block, block.forward)


def _in_training(block: nn.Module, eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else eager)(*args, **kwargs)

    return forward
