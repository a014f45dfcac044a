"""The losses of finished runs, in a file of the sweep's folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path


class Record:
    """A file with one line for each finished run: its overrides, the identity of its configuration, and its loss.

    Args:
        file: The file, which is appended to.
        identity: Returns what identifies the configuration of a run, from its overrides.
    """

    def __init__(self, file: Path, identity: Callable[[list[str]], str]) -> None:
        self.file = file
        self._identity = functools.cache(lambda words: identity(list(words)))  # which takes half as long as a short run
        self._known: dict[str, float] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a comparison that was killed
                continue
            self._known[row["identity"]] = float(row["loss"])

    def find(self, words: list[str]) -> float | None:
        """Return the loss of a run, or None if it has not finished."""
        return self._known.get(self._identity(tuple(words)))

    def add(self, words: list[str], loss: float) -> None:
        """Add a run that has finished."""
        identity = self._identity(tuple(words))
        if identity not in self._known:
            self._known[identity] = loss
            with self.file.open("a") as file:
                file.write(json.dumps({"overrides": words, "identity": identity, "loss": loss}) + "\n")
