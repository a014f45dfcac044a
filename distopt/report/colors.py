"""How a group of runs is drawn: the color is its optimizer, the dash its learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.job.drawing import COLORS
from distopt.report.grouping import DataSet, Group

MANY = 12  # the most groups with a color of their own; of more, the best of each optimizer
_DASHES = ("solid", "7px,4px", "2px,3px", "7px,3px,2px,3px", "13px,4px", "13px,3px,2px,3px,2px,3px")
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "star")  # of optimizers beyond the number of colors
GRAY = "#999999"


@dataclass(frozen=True)
class Style:
    """The style of a group.

    Attributes:
        color: The color, of its optimizer.
        dash: The dash of its lines, of its learning rate.
        symbol: The symbol of its points, of its optimizer.
        named: Whether it has a name of its own in a picture; if not, it is one of the gray ones.
    """

    color: str
    dash: str
    symbol: str
    named: bool = True


def styles(dataset: DataSet, optimizers: Sequence[str]) -> dict[Group, Style]:
    """Return the style of each group.

    Args:
        dataset: The groups, the best first.
        optimizers: The optimizers of the whole page, so that one has the same color in all pictures.
    """
    groups = dataset.groups
    firsts = list({group.optimizer: group for group in reversed(groups)}.values())
    named = [group for group in groups if len(groups) <= MANY or group in firsts][:MANY]
    rates = [str(lr) for lr in sorted({group.runs[0].lr for group in named})]  # one of nan, too, is equal to itself
    found = {}
    for group in groups:
        number = list(optimizers).index(group.optimizer)
        color, symbol = COLORS[number % len(COLORS)], _SYMBOLS[number // len(COLORS) % len(_SYMBOLS)]
        if group in named:
            found[group] = Style(color, _DASHES[rates.index(str(group.runs[0].lr)) % len(_DASHES)], symbol)
        else:
            found[group] = Style(GRAY, "solid", symbol, named=False)
    return found
