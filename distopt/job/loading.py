"""A line for a person who looks on, before what takes seconds to import."""

from __future__ import annotations

import os
import sys


def loading() -> None:
    """Says on the terminal that PyTorch is loaded now; the first process of a launch does."""
    if sys.stderr.isatty() and os.environ.get("RANK") in (None, "0"):
        print("distopt: loading PyTorch", file=sys.stderr)
