"""The cells of a cross product that `make test` runs; the others are marked `matrix`, for `make matrix`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

MATRIX = pytest.mark.matrix


def some(quick: Collection[Any], every: Iterable[Any]) -> list[ParameterSet]:
    """Return every cell for `parametrize`, all but those of `quick` marked `matrix`.

    Raises:
        ValueError: If `quick` has a cell that does not exist.
    """
    listed = list(every)
    unknown = [cell for cell in quick if cell not in listed]
    if unknown:
        raise ValueError(f"no cells: {unknown}")
    marks = [() if cell in quick else MATRIX for cell in listed]
    return [pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=m) for cell, m in zip(listed, marks)]


def covering(*axes: Sequence[Any]) -> list[ParameterSet]:
    """Return the product of the axes for `parametrize`; the cells that are not marked have each value of each axis.

    They are those of the diagonal, on which shorter axes repeat.
    """
    diagonal = [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]
    return some(diagonal, itertools.product(*axes))
