"""Fast ways to do what a rule says: chosen here, equal to the rule by test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from distopt.kernels.cpu import compiled, fits
from distopt.kernels.norms import squared_norms
from distopt.kernels.shards import Shards
from distopt.kernels.triton import triton_updates, unfit
from distopt.kernels.update import ForeachUpdate

F = TypeVar("F", bound=Callable[..., Any])


def kernel(name: str) -> Callable[[F], F]:
    """Says that a rule's `directions` is what the kernel of this name does. One that overrides it has none."""

    def named(directions: F) -> F:
        directions.kernel = name  # type: ignore[attr-defined]
        return directions

    return named


def updates(optimizer: Any, shards: Shards) -> list[Any]:
    """What does the step of these shards: the kernel of their rule where there is one for them, else the rule."""
    name = getattr(type(optimizer).directions, "kernel", "")
    chosen, left = triton_updates(name, shards) if name else ([], list(range(len(shards.params))))
    if chosen and not left:
        return chosen
    return chosen + _others(optimizer, name, shards.part(left) if chosen else shards)


def check_capturable(optimizer: Any, shards: Shards) -> None:
    """Raises ValueError where shards of a capturable group have no kernel of Triton's."""
    left = unfit(shards) if getattr(type(optimizer).directions, "kernel", "") else list(range(len(shards.params)))
    if left:
        raise ValueError(
            f"capturable=True needs Triton's kernels, and {len(left)} of the param group's tensors (the first: "
            f"{shards.params[left[0]].dtype} on {shards.params[left[0]].device}) have none: they are for rules of "
            "distopt on contiguous float32 weights on a GPU; or give capturable=False"
        )


def _others(optimizer: Any, name: str, shards: Shards) -> list[Any]:
    kinds = dict.fromkeys(g.dtype for g in shards.grads)
    if name and len(kinds) > 1:  # beside masters, whose gradients have 16 bits, the others keep their kernel
        alike = [[i for i, g in enumerate(shards.grads) if g.dtype is kind] for kind in kinds]
        return [move for indices in alike for move in _others(optimizer, name, shards.part(indices))]
    fitting = fits(shards) if name else []
    if not fitting:
        return [ForeachUpdate(optimizer, shards)]
    if len(fitting) == len(shards.params):
        return [compiled(name, shards)]
    rest = sorted(set(range(len(shards.params))) - set(fitting))
    return [compiled(name, shards.part(fitting)), ForeachUpdate(optimizer, shards.part(rest))]


def squares(shards: Shards) -> tuple[Tensor, Tensor]:
    """|p|^2 and |gradient|^2 of each shard, for rules that need norms before their state moves; in digits."""
    if shards.params and len(fits(shards)) == len(shards.params):
        return compiled("norms", shards).squares()  # both in one pass
    return squared_norms(shards.params, shards.rows), squared_norms(shards.grads, shards.rows)


def joined(squares: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The columns of several pairs of squares, end to end."""
    held = [pair for pair in squares if len(pair[0])] or squares[:1]  # those of nothing are on the host
    return [torch.cat(column) for column in zip(*held)]
