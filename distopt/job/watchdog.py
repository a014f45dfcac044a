"""Ends a job whose ranks wait for one that does not come, with a line that names it."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from distopt import collective
from distopt.failures import LostRank

T = TypeVar("T")

_SPEAKERS = 8  # ranks that look for the missing ones; at thousands the store would be asked by all of them at once


class Watchdog:
    """A thread that tells the other ranks where this one is, and ends the process when a step does not end.

    Every rank writes the step that it is in, and a count that shows that its process runs, to the store in which the
    ranks have met. A rank whose step is not over shortly before the timeout reads those of the others, and says which
    ranks have stopped, or are behind. So engines whose groups have no timeout (DeepSpeed 0.19.8 makes its own without
    one) end as well, and others before their backend ends them by a message about a connection.

    Args:
        store: The store of the job, in a connection of its own; None for one process, which waits for nobody.
        minutes: How long a rank waits for others: `train.timeout_minutes`.
        end: Called in the thread, with a line, when the time is over; has to end the process.
    """

    def __init__(self, store: Any | None, minutes: float, end: Callable[[str], None]) -> None:
        self._store, self._minutes, self._end = store, minutes, end
        self._look = min(60.0 * minutes / 8.0, 10.0)  # seconds between two looks
        self._step, self._since = -1, float("inf")
        self._beats, self._closed = 0, threading.Event()
        self._main = threading.get_ident()
        if store is not None:
            self._beat()
            threading.Thread(target=self._watch, name="distopt-watchdog", daemon=True).start()

    def enter(self, step: int) -> None:
        """Starts the clock of a step, or of another part of the job in which ranks wait for each other."""
        self._step, self._since = step, time.monotonic()

    def leave(self) -> None:
        """Stops the clock: what follows may take its time."""
        self._since = float("inf")

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields batches, each with a clock of its own."""
        for batch in batches:
            self.enter(self._step)
            yield batch
        self.leave()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around a run: raises `LostRank` in place of a backend's error about a connection; then closes."""
        try:
            yield
        except RuntimeError as error:
            if not re.search(r"(?i)connection (closed|reset)|timed out|broken pipe|connection refused", str(error)):
                raise
            self.leave()  # this thread says it
            late = "timed out" in str(error).lower()
            raise LostRank(self._told() if late else "another rank has ended; its message says why") from error
        finally:
            self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._look):
            self._beat()
            since = self._since
            if time.monotonic() - since > 60.0 * self._minutes - 4.0 * self._look:
                line = self._told()
                if self._since == since and not self._closed.is_set():  # still
                    self._end(line)

    def _told(self) -> str:
        """Says which ranks this one waits for, and where; two looks long."""
        if collective.rank() >= _SPEAKERS:
            return f"the wait for another rank took longer than train.timeout_minutes={self._minutes:g}"
        before = self._read()
        for _ in range(2):
            time.sleep(self._look)
            self._beat()
        missing = []
        for rank, (host, step, beats) in enumerate(self._read()):
            if rank != collective.rank() and before[rank][2] == beats:
                missing.append(f"rank {rank} on {host} does not answer")
            elif int(step) < self._step:
                missing.append(f"rank {rank} on {host} is still in step {int(step) + 1}")
        shown = "; ".join(missing[:4]) + ("; ..." if len(missing) > 4 else "")
        place = _place(sys._current_frames().get(self._main))
        return (
            f"step {self._step + 1} takes longer than train.timeout_minutes={self._minutes:g}"
            f"{f' in {place}' if place else ''}: {shown or 'all ranks are in this step'}"
        )

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(collective.rank()), f"{socket.gethostname()} {self._step} {self._beats}")  # type: ignore[union-attr]

    def _read(self) -> list[list[str]]:
        if self._store is None:
            return []
        return [value.decode().split() for value in self._store.multi_get(list(map(str, range(collective.world()))))]


def _place(frame: FrameType | None) -> str:
    """Returns the function of this package that a thread is in."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("distopt.") and not module.endswith("watchdog"):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""
