"""The progress of a run: a bar with loss, speed and time left on a terminal, a line at times in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from rich.text import Text

from distopt.job.terminal import Terminal

_REDRAW = 0.2  # seconds
_LOG = 10.0  # seconds between two lines of a log file
_BAR = (10, 40)  # columns
_STEPS = 20  # whose mean is the speed


class Progress:
    """The steps that are done, with their numbers.

    Args:
        terminal: Shows it.
        first_step: The number of steps done before (a resumed run).
        steps: The number of steps in all.
    """

    def __init__(self, terminal: Terminal, first_step: int, steps: int) -> None:
        self._terminal, self._steps = terminal, steps
        self.done = self._first = first_step
        self._began: float | None = None
        self._shown = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._tokens: deque[int] = deque(maxlen=_STEPS)
        self._values: dict[str, str] = {}
        self._said = first_step  # the step of the last line of a log file

    def update(self, done: int, seconds: float, tokens: int, values: Mapping[str, str]) -> None:
        """Shows a step, unless another one was shown just before.

        Args:
            done: The number of steps done.
            seconds: The time of the step.
            tokens: Its tokens.
            values: What else to show, by name, the most important first; where a line is short, the last are left out.
        """
        self.done = done
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        self._values = dict(values)
        now, live = time.monotonic(), self._terminal.live
        self._began = now - seconds if self._began is None else self._began
        if now - self._shown >= (_REDRAW if live else _LOG):
            self._shown = now
            self._show()

    def go_back(self, done: int) -> None:
        """Continues from an earlier step."""
        self.done = self._said = done

    def close(self) -> None:
        """Shows the last step, as a line."""
        self._terminal.clear()
        if self.done > self._said:
            self._say()

    def line(self, width: int, ascii_only: bool = False) -> Text:
        """Returns the bar between the step and as many of the numbers as there is room for."""
        step, *fields = self._fields(width - _BAR[0] - 2)
        numbers = "  ".join(fields)
        room = min(max(width - len(step) - len(numbers) - 3, _BAR[0]), _BAR[1])
        full = round(room * self.done / max(self._steps, 1))
        one, other = ("#", "-") if ascii_only else ("━", "━")
        return Text.assemble(step, " ", (one * full, "green"), (other * (room - full), "bright_black"), " ", numbers)

    def _show(self) -> None:
        if self._terminal.live:
            self._terminal.state(self.line(self._terminal.width - 1, self._terminal.ascii))
        else:
            self._say()

    def _say(self) -> None:
        self._terminal.say("  ".join(self._fields(self._terminal.width)))
        self._said = self.done

    def _fields(self, width: int) -> list[str]:
        """The step, and as many of the numbers as there is room for."""
        loss, *others = [f"{name} {value}".strip() for name, value in self._values.items()] or [""]
        seconds = sum(self._seconds)
        speed = f"{sum(self._tokens) / seconds:,.0f} tok/s" if seconds else ""
        now = time.monotonic()
        took = now - (now if self._began is None else self._began)  # with evaluations and checkpoints
        left = took / max(self.done - self._first, 1) * (self._steps - self.done)
        ends = f"{duration(left)} left" if self.done < self._steps else f"in {duration(took)}"
        fields = [f"step {self.done}/{self._steps}", loss, speed, ends, *others]
        while len(fields) > 2 and len("  ".join(fields)) > width:
            fields.pop()
        return fields


def shown(row: Mapping[str, float]) -> dict[str, str]:
    """Returns what to show of a step's row of metrics, the most important first."""
    values = {"loss": f"{row['loss']:.4f}"}
    if row["skipped"]:
        values["skipped"] = f"{row['skipped']}"
    if "token_accuracy" in row:
        values["accuracy"] = f"{row['token_accuracy']:.1%}"
    if "mfu" in row:
        values["MFU"] = f"{row['mfu']:.0%}"
    if "device_gib" in row:
        values["memory"] = f"{row['device_gib']:.1f} GiB"
    values |= {"lr": f"{row['lr']:.2e}", "|g|": f"{row['grad_norm']:.2f}"}
    return {**values, "data": f"{1e3 * row['data_seconds']:.1f} ms"}


def duration(seconds: float) -> str:
    """Returns a time as 0:07, 12:05, 3:04:05 or 2 d 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
