"""The verdict: which parameter is wrong, and on which ranks, from the claims of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distopt.proof.claims import COVERAGE, WHETHER, Claims

# The fault of a rank, the members of its groups, and the claims that must be equal on all ranks.
Told = tuple[str, list[tuple[int, ...]], dict[str, Any]]

_APART = (
    "; where ranks are meant to train apart, tell distopt.prove_every which train together (group=), or never to prove "
    "(steps=0)"
)


def difference(ranks: Sequence[int], told: Sequence[Told]) -> str:
    """Describes the first claim, other than content, in which ranks differ."""
    for rank, (fault, *_) in zip(ranks, told):
        if fault:
            alone = sum(bool(other) for other, *_ in told) < len(told)
            return f"rank {rank}: {fault}" if alone else fault
    first, plain = ranks[0], told[0][2]
    for rank, (_, _, other) in zip(ranks, told):
        for name, value in plain.items():
            if other.get(name) != value:
                return _unequal(name, value, other.get(name), first, rank)
    for rank, (_, groups, _) in zip(ranks, told):
        for k, members in enumerate(groups):
            for member in members:
                theirs = told[list(ranks).index(member)][1]
                if len(theirs) <= k or theirs[k] != members:
                    return (
                        f"ranks would communicate with others than these with them: group {k} of rank {rank} is "
                        f"{list(members)}, rank {member} has {[list(group) for group in theirs]}: make the same meshes "
                        "and process groups in the same order on every rank"
                    )
    return (
        "ranks do not prove the same: what was received is no rank's answer, or they have groups of other numbers "
        f"({[len(groups) for _, groups, _ in told]})"
    )


def _unequal(name: str, mine: Any, other: Any, first: int, rank: int) -> str:
    """Describes the claim in which two ranks differ."""
    if name == "layers":
        i = _first_unequal(mine, other)
        here, there = _entry(mine, i), _entry(other, i)
        return (
            f"ranks step other parameters: number {i} of {len(mine)} is {here} on rank {first}, of {len(other)} it is "
            f"{there} on rank {rank}: give every rank the same parameters in the same order{_APART}"
        )
    if name == "options":
        i = _first_unequal(mine, other)
        if i < min(len(mine), len(other)):
            unequal = sorted({key for key, _ in _different(mine[i], other[i])})
            values = [{k: v for k, v in group if k in unequal} for group in (mine[i], other[i])]
            return (
                f"ranks have other options: param group {i} has {values[0]} on rank {first}, {values[1]} on rank {rank}"
            )
        return f"ranks have other param groups: {len(mine)} on rank {first}, {len(other)} on rank {rank}"
    if name == "steps":
        i = _first_unequal(mine, other)
        return (
            f"ranks have taken other numbers of steps: {_entry(mine, i)} on rank {first}, {_entry(other, i)} on rank "
            f"{rank} (of tensor {i}): a rank has left out a step, or has loaded another checkpoint"
        )
    if name == "kind":
        layouts = f"{mine} on rank {first}, {other} on rank {rank}"
        return f"ranks have other layouts, {layouts}: call optimizer.bind on every rank, or on none"
    if name == "columns":
        return f"ranks ask other things: {mine} on rank {first}, {other} on rank {rank}: prove alike on every rank"
    i = _first_unequal(mine, other)
    what = {"unclaimed": "parameters that the optimizer lacks", "buffers": "state"}.get(name, name)
    return f"ranks have other {what}: {_entry(mine, i)} on rank {first}, {_entry(other, i)} on rank {rank}"


def _different(mine: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    return [item for item in [*mine, *other] if item not in mine or item not in other]


def _first_unequal(mine: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))


def _entry(values: Sequence[Any], i: int) -> str:
    if i >= len(values):
        return "nothing"
    value = values[i]
    return _described(value) if isinstance(value, tuple) and isinstance(value[1], tuple) else str(value)


def _described(layer: tuple[str, tuple[int, ...], str]) -> str:
    name, shape, dtype = layer
    return f"{name} ({list(shape)}, {dtype.removeprefix('torch.')})"


def wrong_layer(ranks: Sequence[int], own: Claims, tables: Tensor) -> str:
    """Describes the first parameter that is wrong, in which respect, and on which ranks, by majority.

    Args:
        ranks: The ranks that take part.
        own: The claims of this rank.
        tables: The columns of every rank, summed over their groups: shape [ranks, columns, num_layers].
    """
    for layer, described in enumerate(own.layers):
        name = _described(described)
        for column, values in zip(own.columns, tables[:, :, layer].T.tolist()):
            if column.what == COVERAGE and any(values):
                return (
                    f"{name}: the parts that the ranks step are not the full parameter, each element once: the layout "
                    f"does not say how it is sharded{_APART}"
                )
            if column.copies and any(values):
                named = _listed([rank for rank, value in zip(ranks, values) if value])
                return (
                    f"{name}: {named} have copies of {_the(column.what)} that differ, where the layout says that "
                    "they are equal: begin with equal weights, and reduce gradients over these ranks too"
                )
            if not column.zero and len(set(values)) > 1:
                return f"{name}: ranks differ in {_the(column.what)}: {_who(ranks, values)}{_remedy(column.what)}"
    return "ranks differ in what they have"


def _the(what: str) -> str:
    return what if what.startswith(("whether ", "the ")) else f"the {what}"


def _who(ranks: Sequence[int], values: Sequence[int]) -> str:
    """Names the ranks whose value is rare; all of them, if no value has a majority."""
    (usual, count), *_ = Counter(values).most_common(1)
    rare = [rank for rank, value in zip(ranks, values) if value != usual]
    if count * 2 > len(values):
        return f"{_listed(rare)} against all others"
    return f"no majority among {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{f' and {len(ranks) - 8} more' * (len(ranks) > 8)}"


def _remedy(what: str) -> str:
    if what == WHETHER:
        return "; a rank's loss has not used it: use it on every rank, or on none"
    if what == "gradient":
        return f"; it has to be reduced over the ranks before a step{_APART}"
    if what == "weights":
        return f"; begin with equal weights (by seed, or broadcast), and step by equal gradients{_APART}"
    return "; load the same state on every rank"
