"""What a run shows: a block at the start, lines, and below them one line that changes; in a log file lines alone."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

_ERASE = Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2))
_LABEL = 12  # columns
_LOG = 100_000  # columns of a log file, whose lines are not broken


class Terminal:
    """The standard output of the first process; the others show nothing.

    The changing line is rewritten in place, without a thread and without hiding the cursor: what ends the process, at
    whatever moment, leaves a terminal that can be typed into.

    Args:
        main: Whether this process shows anything; None for the first one of a launch.

    Attributes:
        main: Whether this process shows anything.
        live: Whether a person looks on: the output is a terminal.
    """

    def __init__(self, main: bool | None = None) -> None:
        self.main = os.environ.get("RANK") in (None, "0") if main is None else main
        self.live = self.main and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        width = None if self.live else _LOG
        self._console = Console(width=width, force_terminal=self.live, highlight=False, markup=False, emoji=False)
        self._state: Text | None = None
        self._stays = False  # whether lines go above it, instead of into its place

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()

    @property
    def width(self) -> int:
        """The number of columns, now."""
        return self._console.width

    @property
    def ascii(self) -> bool:
        """Whether the output has no characters beyond ASCII."""
        return not self._console.encoding.startswith("utf")

    def say(self, line: str, style: str = "") -> None:
        """Shows a line."""
        if self.main:
            self._erase()
            self._console.print(Text(line, style), soft_wrap=True)
            self._state = self._state if self._stays else None
            self._draw()

    def block(self, rows: Mapping[str, str]) -> None:
        """Shows values by name, one under the other; long ones are broken into lines."""
        self.clear()
        for name, value in rows.items():
            lines = textwrap.wrap(value, max(20, self.width - _LABEL - 1), break_on_hyphens=False) or [""]
            for i, line in enumerate(lines):
                if self.main:
                    label = (name if i == 0 else "").ljust(_LABEL)
                    self._console.print(Text.assemble((label, "bold"), line), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Shows, to a person who looks on, what the run does now, until the next line."""
        self.state(Text(f"{text} ...", "dim"), stays=False)

    def state(self, line: Text, stays: bool = True) -> None:
        """Shows the line that changes, instead of the one before; it stays below the lines that are said."""
        self._stays = stays
        if self.live:
            line.truncate(self.width - 1, overflow="crop")
            self._state = line
            self._erase()
            self._draw()

    def clear(self) -> None:
        """Removes the line that changes."""
        self._erase()
        self._state = None

    def _erase(self) -> None:
        if self.live and self._state is not None:
            self._console.control(_ERASE)

    def _draw(self) -> None:
        if self.live and self._state is not None:
            self._console.print(self._state, end="\r", no_wrap=True)
            self._console.file.flush()
