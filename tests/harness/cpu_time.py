"""The CPU time of each test file: that of this process and of every process it has started, running or ended."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The CPU seconds that an unmarked test may take, including the fixtures that it is the first to use. The summary names
# those above it, but the run does not fail: a busy machine needs more CPU time for the same work.
LIMIT = 20.0
_SHOWN = 25
_WORTH_READING = 0.2  # seconds since the last reading; until then a test's time is added to that of the next one
_TICKS = os.sysconf("SC_CLK_TCK")
_KEY = "cpu_seconds"


def used() -> float:
    """Return the CPU seconds of this process and of its descendants so far.

    The time of a process that has ended is part of its parent's, once the parent has waited for it. The ranks and jobs
    are children of the fork server, which waits for them.
    """
    return sum(map(_of_process, _family(os.getpid())))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return
    for child in children:
        yield from _family(child)


def _of_process(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS  # user and system: its own, and of the children it has waited for


class Meter:
    """A pytest plugin: each worker measures its tests, and the process that prints the summary adds them up."""

    def __init__(self) -> None:
        self.by_file: Counter[str] = Counter()
        self.too_long: dict[str, float] = {}
        self._used, self._time = 0.0, 0.0

    def pytest_runtestloop(self) -> None:
        self._used, self._time = used(), time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        if call.when == "teardown" and time.monotonic() - self._time > _WORTH_READING:
            now = used()
            item.user_properties.append((_KEY, now - self._used))
            self._used, self._time = now, time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = dict(report.user_properties).get(_KEY) if report.when == "teardown" else None
        if seconds is not None:
            self.by_file[report.nodeid.partition("::")[0]] += seconds
            if seconds > LIMIT and "matrix" not in report.keywords:
                self.too_long[report.nodeid] = seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"CPU seconds: {self.by_file.total():.0f}")
        for file, seconds in self.by_file.most_common(_SHOWN):
            terminalreporter.line(f"{seconds:7.1f}  {file}")
        for test, seconds in self.too_long.items():
            terminalreporter.line(
                f"{test} took {seconds:.0f} CPU seconds, more than {LIMIT:g}: make it smaller, or mark it matrix",
                red=True,
            )
