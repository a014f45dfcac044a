"""Fast ways to do what a rule says: chosen here, equal to the rule by test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from distopt.kernels.cpu import compiled, fits
from distopt.kernels.triton_move import triton_moves
from distopt.move import Move
from distopt.shards import Shards

F = TypeVar("F", bound=Callable[..., Any])


def kernel(name: str) -> Callable[[F], F]:
    """Says that a rule's `directions` is what the kernel of this name does. One that overrides it has none."""

    def named(directions: F) -> F:
        directions.kernel = name  # type: ignore[attr-defined]
        return directions

    return named


def moves(optimizer: Any, shards: Shards) -> list[Any]:
    """What does the step of these shards: the kernel of their rule where there is one for them, else the rule."""
    name = getattr(type(optimizer).directions, "kernel", "")
    chosen, left = triton_moves(name, shards) if name else ([], list(range(len(shards.params))))
    if left and shards.group["capturable"]:
        raise ValueError(
            f"capturable=True needs Triton's kernels, and {len(left)} of the param group's tensors (the first: "
            f"{shards.params[left[0]].dtype} on {shards.params[left[0]].device}) have none: they are for rules of "
            "distopt on contiguous float32 weights on a GPU; or give capturable=False"
        )
    if chosen and not left:
        return chosen
    return chosen + _others(optimizer, name, (shards.part(left) if chosen else shards).widened())


def _others(optimizer: Any, name: str, shards: Shards) -> list[Any]:
    fitting = fits(shards) if name else []
    every = len(fitting) == len(shards.params)
    fast = compiled(name, shards if every else shards.part(fitting)) if fitting else None
    if fast is None:
        return [Move(optimizer, shards)]
    rest = sorted(set(range(len(shards.params))) - set(fitting))
    return [fast, Move(optimizer, shards.part(rest))] if rest else [fast]
