"""The choices that a run's own picture and the page of a report share: colors, smoothing, and limits of axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Okabe and Ito, "Color Universal Design", 2008, without black and yellow, which one background or the other hides.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_WINDOW = 0.05  # of a run
_HUGE = 1e100
_AT_ONCE = 1 << 20  # values of windows
_BEYOND = 3.0  # how far above the third quartile, in distances from the least value to it, an axis reaches

Array = NDArray[np.float64]


def smoothed(values: Sequence[float] | Array, at: NDArray[np.int64] | None = None) -> Array:
    """Smooth the values of consecutive steps, without a lag.

    The value of a step is that of a straight line, fitted by least squares to the values of a centered window of 5 %
    of all steps: their mean, but at both ends, where the window ends and the line goes on to the last step. It stays
    within the values of its window.

    Args:
        values: The values; those that are not finite are left out of the fit.
        at: The indices of the steps to return; None for all.

    Returns:
        The smoothed values; nan before the first and after the last finite one.
    """
    y = np.asarray(values, dtype=np.float64)
    at = np.arange(len(y)) if at is None else at
    finite = np.flatnonzero(np.isfinite(y))
    if not len(finite):
        return np.full(len(at), math.nan)
    reach = int(_WINDOW * len(y) / 2)
    first = np.clip(at - reach, 0, len(y) - 2 * reach - 1)
    window = np.arange(2 * reach + 1)
    parts = np.array_split(np.arange(len(at)), len(at) * len(window) // _AT_ONCE + 1)
    line = np.concatenate([_fitted(y[first[part, None] + window], window, at[part] - first[part]) for part in parts])
    return np.where((at < finite[0]) | (at > finite[-1]), math.nan, line)


def _fitted(y: Array, x: NDArray[np.int64], at: NDArray[np.int64]) -> Array:
    """The values, at one place of each row, of the lines that are fitted to the finite values of the rows."""
    known = np.isfinite(y)
    scale = np.abs(np.where(known, y, 0.0)).max(axis=1, keepdims=True)
    scale[scale == 0] = 1.0  # the largest floats have no sum
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(known, y / scale, 0.0)
        count = known.sum(axis=1)
        center, height = (known * x).sum(axis=1) / count, y.sum(axis=1) / count
        apart = np.where(known, x - center[:, None], 0.0)
        spread = (apart * apart).sum(axis=1)
        slope = np.where(spread > 0, (apart * y).sum(axis=1) / spread, 0.0)
        line = height + slope * (at - center)
    least, greatest = (np.where(known, y, filled) for filled in (math.inf, -math.inf))
    found: Array = np.clip(line, least.min(axis=1), greatest.max(axis=1)) * scale[:, 0]
    return found


def limits(
    curves: Sequence[Sequence[float] | Array], behind: Sequence[Sequence[float] | Array] = ()
) -> tuple[float, float]:
    """Return the least and the greatest value of an axis that shows some curves where most of their values are.

    The axis begins at the least value. It ends at the greatest, but for those so far above the rest that the rest would
    be flat: the start of a run, spikes, and runs that diverge. What is above has to be marked.

    Args:
        curves: The values of each curve; those that are not finite do not count.
        behind: The values of the raw curves behind these, of which only the least counts.
    """
    finite = _countable(curves)
    if not finite:
        return 0.0, 1.0
    low = float(min(array.min() for array in [*finite, *_countable(behind)]))
    tops = sorted(_top(array) for array in finite)
    usual = statistics.median_low(tops)
    bound = usual + _BEYOND * (usual - low)
    high = max(top for top in tops if top <= bound or usual == low)
    return low, high if high > low else low + max(1e-3, 1e-3 * abs(low))


def _countable(curves: Sequence[Sequence[float] | Array]) -> list[Array]:
    """The values of each curve that has some, but for those that no axis shows beside others."""
    arrays = [np.asarray(curve, dtype=np.float64) for curve in curves]
    return [kept for array in arrays if len(kept := array[np.abs(array) < _HUGE])]


def _top(values: Array) -> float:
    """The greatest of a curve's values that is not far above most of them."""
    low, quartile = values.min(), np.quantile(values, 0.75)
    bound = quartile + _BEYOND * (quartile - low)
    return float(values.max() if quartile == low else values[values <= bound].max())


def beyond(values: Sequence[float] | Array, high: float) -> list[int]:
    """Return where marks at the upper end of an axis stand for the parts of a curve above it.

    Args:
        values: The values of the curve.
        high: The greatest value of the axis.

    Returns:
        The index of the greatest value of each part, and the last index of a part that reaches to the end.
    """
    array = np.asarray(values, dtype=np.float64)
    array = np.where(np.isnan(array), -math.inf, array)
    above = np.flatnonzero(array > high)
    parts = np.split(above, np.flatnonzero(np.diff(above) > 1) + 1) if len(above) else []
    marks = {int(part[array[part].argmax()]) for part in parts}
    if len(above) and above[-1] == len(array) - 1:
        marks.add(len(array) - 1)
    return sorted(marks)
