"""A report of runs that still train: the page is written again when one of them has changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from distopt.bounds import number
from distopt.report.find import Finder, NoRuns
from distopt.report.page import write_page

EVERY = number(1.0, 3600.0)
_SHARE = 0.1  # of a processor, at most, that belongs to the runs
IDLE = 3600.0  # seconds without a change after which it ends


def watch(
    finder: Finder,
    out: Path,
    every: float,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Path | None:
    """Write the page when a run changes, until Ctrl-C or an hour without a change.

    An open page loads itself again meanwhile; the last one that is written stays as it is. If writing takes long, it
    is done less often: at most a tenth of the time.

    Args:
        finder: Finds the runs; the folders have to exist, but their runs may come later.
        out: The folder to write.
        every: The seconds between two looks, in [1, 3600].
        say: Shows a line.
        sleep: Waits for some seconds.
        clock: Returns the time in seconds.

    Returns:
        The path of the page; None if no run has come.

    Raises:
        ValueError: If `every` is out of bounds, or there is no such folder.
    """
    EVERY.check("--watch", every, "the seconds between two looks at the runs")
    seen, page, changed = None, None, clock()
    try:
        while clock() - changed < IDLE:
            began, stamps = clock(), finder.stamps()
            if stamps != seen:
                written = _write(finder, out, every, say if page is None else lambda line: None)
                page, seen, changed = written or page, stamps, clock()
            sleep(max(every, (clock() - began) / _SHARE))
        say(f"no run has changed for {IDLE / 60:.0f} minutes")
    except KeyboardInterrupt:
        say("")
    if page is not None:
        write_page(finder, out)
    return page


def _write(finder: Finder, out: Path, every: float, say: Callable[[str], None]) -> Path | None:
    """Write the page; None, and a line, if there is no run yet."""
    try:
        page = write_page(finder, out, every)
    except NoRuns:
        say("waiting for the first step of a run")
        return None
    say(f"report: {page}, written again when a run changes; Ctrl-C ends this")
    return page
