"""The runs below some folders, each read again only if it has changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distopt.job.records import ALARMS, LAYERS, METRICS, RUN
from distopt.job.run_folder import near
from distopt.report.comparison import FILE as COMPARISON
from distopt.report.runs import CONFIG, Run
from distopt.report.search import FILE as SEARCH

Stamp = tuple[tuple[int, int] | None, ...]  # the time and the size of each file of a run


class NoRuns(ValueError):
    """There is no run that has trained a step, yet."""


@dataclass
class Finder:
    """Finds and reads the runs at or below some folders.

    Attributes:
        folders: Runs, sweeps, or folders of them.
        damaged: A line about each run that was left out by the last `find`, since a file of it is damaged.
    """

    folders: Sequence[Path]
    damaged: list[str] = field(default_factory=list)
    _read: dict[Path, tuple[Stamp, Run | str]] = field(default_factory=dict)

    def find(self) -> list[Run]:
        """Return the runs by name, the numbers in it in their order.

        Raises:
            NoRuns: If no run has trained a step.
            ValueError: If there is no such folder, or no run in it that can be read.
        """
        found: dict[Path, Run | str] = {}
        for root in self.folders:
            if not root.is_dir():
                raise ValueError(f"{root}: no such folder; give a run, a sweep, or a folder of them")
            for folder in _walk(root):
                key = folder.resolve()  # a folder that is given twice, or by a link, counts once
                if key not in found:
                    found[key] = self._of(folder, self._name(folder, root), key)
        self.damaged = [run for run in found.values() if isinstance(run, str)]
        runs = [run for run in found.values() if isinstance(run, Run) and run.train]
        if not runs and self.damaged:
            raise ValueError(self.damaged[0])
        if not runs:
            where = ", ".join(map(str, self.folders))
            raise NoRuns(f"{where}: no run that has trained a step ({METRICS}); give a folder of runs")
        return sorted(runs, key=lambda run: _in_order(run.name))

    def stamps(self) -> dict[Path, Stamp]:
        """Return when each run, and what is written of a sweep, has last changed."""
        runs = {folder: _stamp(folder) for root in self.folders if root.is_dir() for folder in _walk(root)}
        of_sweeps = [root / name for root in self.folders for name in (COMPARISON, SEARCH)]
        return runs | {file: (_time_and_size(file),) for file in of_sweeps}

    def _of(self, folder: Path, name: str, key: Path) -> Run | str:
        """The run of a folder, or what is damaged in it."""
        stamp = _stamp(folder)
        if self._read.get(key, (None,))[0] != stamp:
            try:
                run: Run | str = Run.read(folder, name)
            except (ValueError, OSError) as error:
                run = str(error)
            except RecursionError:
                run = f"{folder / CONFIG} is nested too deeply; remove it, or the run"
            self._read[key] = stamp, run
        return self._read[key][1]

    def _name(self, folder: Path, root: Path) -> str:
        if len(self.folders) > 1:
            return near(folder.absolute())
        return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def _walk(root: Path) -> Iterator[Path]:
    """The folders at or below another one that have metrics; checkpoints, of many files, are passed over."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name != "checkpoints" and not name.startswith("."))
        if METRICS in files:
            yield Path(folder)


def _stamp(folder: Path) -> Stamp:
    return tuple(_time_and_size(folder / name) for name in (METRICS, LAYERS, ALARMS, RUN, CONFIG))


def _time_and_size(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
