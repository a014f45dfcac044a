"""Types of command line arguments, whose bounds argparse states in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from distopt.bounds import Bound, integer, number

N = TypeVar("N", int, float)


def _argument(kind: Callable[[str], N], bound: Bound) -> Callable[[str], N]:
    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}") from None
        if not bound.holds(value):
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return parse


COUNT = _argument(int, integer(1))
COUNT_OR_NONE = _argument(int, integer(0))
POSITIVE = _argument(float, number(0, above=True))
_WIDTH = Bound("a positive multiple of 32", lambda value: isinstance(value, int) and value > 0 and value % 32 == 0)
WIDTH = _argument(int, _WIDTH)
