"""Chooses the update of some shards: a Triton kernel, a C kernel, or the unfused fallback, the rule's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from distopt.kernels.cautious import CautiousUpdate, with_cautious_decay
from distopt.kernels.columns import Column
from distopt.kernels.cpu import compiled_update, fits, without_rule
from distopt.kernels.narrow_cpu import NarrowCompiledUpdate, narrow_fits
from distopt.kernels.narrow_update import NarrowUpdate, narrow_indices
from distopt.kernels.narrow_update import gradient_norms as sliced_gradient_norms
from distopt.kernels.shards import Shards
from distopt.kernels.triton import triton_updates, unfit
from distopt.kernels.update import Directions, ForeachUpdate, GradientRatioUpdate, SquaredNorms, Update

F = TypeVar("F", bound=Callable[..., Any])


def compiled(directions: F) -> F:
    """Marks the `directions` of an optimizer as what the kernel of its rule computes.

    A subclass that overrides `directions` has no kernel, unless it marks its own.
    """
    directions.compiled = True  # type: ignore[attr-defined]
    return directions


def updates(directions: Directions, shards: Shards, ratio_of: str = "update") -> list[Update]:
    """Returns the updates of shards: by kernels where there is one for them, else by the rule's function.

    Args:
        directions: The rule: `ShardedOptimizer.directions`.
        shards: Its inputs.
        ratio_of: Whose norm the trust ratio of a group is about, "update" or "gradient".
    """
    make = partial(_updates, directions)
    if ratio_of == "gradient" and shards.group["trust_ratio"]:
        return [GradientRatioUpdate(shards, make, gradient_norms)]
    return make(shards)


def check_capturable(directions: Directions, shards: Shards) -> None:
    """Raises ValueError where shards of a capturable group have no Triton kernel."""
    left = unfit(shards) if _has_kernel(directions, shards) else list(range(len(shards.params)))
    if left:
        raise ValueError(
            f"capturable=True needs Triton's kernels, and {len(left)} of the param group's tensors (the first: "
            f"{shards.params[left[0]].dtype} on {shards.params[left[0]].device}) have none: they are for rules of "
            "distopt on contiguous float32 weights on a GPU; or give capturable=False"
        )


def gradient_norms(shards: Shards) -> SquaredNorms:
    """Returns |p|^2 and |gradient|^2 of each shard, in the digits of `distopt.kernels.exact`; changes no state."""
    every = list(range(len(shards.params)))
    if narrow_indices(shards):
        if every in narrow_fits(shards).values():
            return NarrowCompiledUpdate(without_rule(shards)).squared_norms()
    elif every and fits(shards) == every:
        return compiled_update(without_rule(shards)).squared_norms()  # both in one pass
    return sliced_gradient_norms(shards)


def is_measured(update: Update) -> bool:
    """Returns whether an update needs sums over all ranks before it is applied."""
    return bool(update.group["trust_ratio"] or update.group["cautious"])


def apply(updates: Sequence[Update], measured: Sequence[Update], ratios: Sequence[Tensor]) -> None:
    """Applies updates: those that were measured by their ratios."""
    for update in updates:
        if not is_measured(update):
            update.step()
    for update, ratio in zip(measured, ratios):
        update.apply(ratio)


def concatenated(pairs: list[SquaredNorms]) -> SquaredNorms:
    """Concatenates the squared norms of several updates, with zeros in the columns that an update does not have."""
    width = max(map(len, pairs))
    # Those of no shards are on the host, and left out.
    kept = [pair for pair in pairs if len(pair[0])] or pairs[:1]
    padded = [(*pair, *[torch.zeros_like(pair[0])] * (width - len(pair))) for pair in kept]
    return tuple(torch.cat(column) for column in zip(*padded))


def norms(updates: Sequence[Update], sums: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns |p| and |direction| (or |gradient|) of the full layers, for each update.

    Args:
        updates: The updates whose squared norms were concatenated.
        sums: These, layer by layer and over all ranks: float64 of shape [columns, layers of the model].
    """
    weight, other = sums[:2].sqrt()
    return [update.norms(sums) if isinstance(update, CautiousUpdate) else (weight, other) for update in updates]


def _has_kernel(directions: Directions, shards: Shards) -> bool:
    cautious = shards.group["cautious"] or shards.group["cautious_decay"]
    return bool(shards.rule.kernel) and getattr(directions, "compiled", False) and not cautious


def _updates(directions: Directions, shards: Shards) -> list[Update]:
    if narrow := narrow_indices(shards):
        others = sorted(set(range(len(shards.params))).difference(narrow))
        plain = _updates(directions, replace(shards.part(others), narrow=None)) if others else []
        return [*plain, *_narrow_updates(directions, shards.part(narrow))]
    if shards.group["cautious"]:
        return [CautiousUpdate(directions, shards)]
    if shards.group["cautious_decay"]:
        return [ForeachUpdate(with_cautious_decay(directions), shards)]
    if not _has_kernel(directions, shards):
        return [ForeachUpdate(directions, shards)]
    on_gpu, left = triton_updates(shards)
    if on_gpu and not left:
        return [*on_gpu]
    return [*on_gpu, *_others(directions, shards.part(left) if on_gpu else shards)]


def _narrow_updates(directions: Directions, shards: Shards) -> list[Update]:
    if shards.group["cautious_decay"]:
        return [NarrowUpdate(with_cautious_decay(directions), shards)]
    fitting = narrow_fits(shards) if _has_kernel(directions, shards) else {}
    rest = sorted(set(range(len(shards.params))).difference(*fitting.values()))
    compiled: list[Update] = [NarrowCompiledUpdate(shards.part(indices)) for indices in fitting.values()]
    return [*compiled, *([NarrowUpdate(directions, shards.part(rest))] if rest else [])]


def _others(directions: Directions, shards: Shards) -> list[Update]:
    dtypes = dict.fromkeys(g.dtype for g in shards.grads) if Column.of(shards.grads).kind is None else ()
    if len(dtypes) > 1:  # next to masters, whose gradients have 16 bits, the others keep their kernel
        alike = [[i for i, g in enumerate(shards.grads) if g.dtype is dtype] for dtype in dtypes]
        return [update for indices in alike for update in _others(directions, shards.part(indices))]
    fitting = fits(shards)
    if not fitting:
        return [ForeachUpdate(directions, shards)]
    if len(fitting) == len(shards.params):
        return [compiled_update(shards)]
    rest = sorted(set(range(len(shards.params))) - set(fitting))
    return [compiled_update(shards.part(fitting)), ForeachUpdate(directions, shards.part(rest))]
