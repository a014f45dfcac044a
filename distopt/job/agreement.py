"""What all processes of a job must have in common, compared before anything slow starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from distopt import collective
from distopt.kernels.build import library

_PACKAGES = ("distopt", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "numpy")


def check_agreement(claims: Mapping[str, Any], remedy: str) -> None:
    """Checks that all processes claim the same. Collective: one message of 32 bytes from each.

    Args:
        claims: Values by name.
        remedy: What to do about a difference.

    Raises:
        ValueError: On every process, naming the first difference and the processes on either side.
    """
    told = {name: json.dumps(value, sort_keys=True, default=str) for name, value in claims.items()}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
    if len(set(collective.on_all(lambda: digest))) == 1:
        return
    every = collective.on_all(lambda: told)
    names = dict.fromkeys(name for each in every for name in each)
    for name in names:
        values = [each.get(name, "missing") for each in every]
        if len(set(values)) > 1:
            sides = [f"{value} on {_ranks(values, value)}" for value in dict.fromkeys(values)]
            raise ValueError(f"the processes differ: {name} is {', '.join(sides[:4])}; {remedy}")


def environment(cfg: DictConfig) -> dict[str, Any]:
    """Returns what a process brings with it: its configuration, versions, and the kernels that it computes with."""
    kernels = "Triton" if torch.cuda.is_available() else "C" if library() is not None else "none"
    versions = {f"the version of {package}": _version(package) for package in _PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    flat, given = (_flat("", OmegaConf.to_container(cfg, resolve=resolve)) for resolve in (True, False))
    # Last, what follows from another key, as model.seed does: the first difference is the one that was given.
    own = {name: value for name, value in flat.items() if "${" not in str(given.get(name, "${"))}
    return {**own, **flat, "the version of Python": python, **versions, "the kernels in use": kernels}


def _flat(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    parts = [_flat(f"{path}.{name}" if path else str(name), each) for name, each in value.items()]
    return {name: each for part in parts for name, each in part.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ranks(values: list[str], value: str) -> str:
    ranks = [rank for rank, each in enumerate(values) if each == value]
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
