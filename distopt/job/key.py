"""A key of the configuration."""

from __future__ import annotations

from typing import NamedTuple

from distopt.bounds import Bound


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
        bound: The type and the bound of its value.
        help: One line on its meaning.
        hint: The remedy in an error message, where the bound does not suggest it.
    """

    bound: Bound
    help: str
    hint: str = ""
