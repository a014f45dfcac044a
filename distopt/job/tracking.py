"""The experiment trackers of Accelerate that a run logs to, each of which a resumed run continues."""

from __future__ import annotations

import json
import os
import secrets
import string
from collections.abc import Callable, Mapping
from math import isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.job.records import read_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "trackers.json"  # in a run's folder: by tracker, the id of its run there, and the last step that it has
_LETTERS, _LENGTH = string.ascii_lowercase + string.digits, 21  # of an id, as every tracker allows


def _named(name: str, group: str | None, **options: Any) -> dict[str, Any]:
    return {"name": name, **options, **({"group": group} if group else {})}


# The arguments with which a tracker starts or continues a run, by the run's id (None at the start if the server gives
# it), its name, and the sweep that it is part of.
_CONTINUES: dict[str, Callable[[Any, str, str | None], dict[str, Any]]] = {
    "wandb": lambda id, name, group: _named(name, group, id=id, resume="allow"),
    "swanlab": lambda id, name, group: _named(name, group, id=id, resume="allow"),
    "trackio": lambda id, name, group: _named(f"{name}-{id[:6]}", group, resume="allow"),  # continues by name
    "mlflow": lambda id, name, group: {"run_id": id, "run_name": name, **({"tags": {"sweep": group}} if group else {})},
}
_GIVEN_BY_SERVER = ("mlflow",)
_TAKE_CHANGES = ("wandb",)  # of the configuration, when a run is continued


def check_trackers(names: str | list[str] | None) -> list[str]:
    """Returns the trackers as a list of names.

    Raises:
        ValueError: If one is unknown to Accelerate or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [names] if isinstance(names, str) else list(names or [])
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"trackers: unknown {name!r}, choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in {str(tracker.value) for tracker in get_available_trackers()}:
            raise ValueError(f"trackers: {name} is not installed: pip install {name}")
    return names


class Trackers:
    """The trackers of a run. A step that one of them has from before the run was resumed is not told again.

    TensorBoard forgets what comes after the checkpoint. The others only append, and keep it: the resumed run has the
    same losses, bit for bit, unless its configuration was changed.

    Args:
        accelerator: Has the names of the trackers in `log_with`. Its main process writes.
        folder: The run's folder; trackers that write files put them into its `logs`.
        name: The name of the run.
        sweep: The sweep that it is part of; None for a run of its own.
        values: The composed configuration, nested; lists are logged as text.
        resumed: The step after which a run in the same folder is resumed; None for a new run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        name: str,
        sweep: str | None,
        values: dict[str, Any],
        resumed: int | None,
    ) -> None:
        self._accelerator, self._file = accelerator, folder / FILE
        self._known: dict[str, dict[str, Any]] = {}  # by tracker
        main = accelerator.is_main_process
        if main and resumed is not None:
            self._known = _read(self._file)
            self._take_in(folder, resumed)
        continued = {*self._known}
        options = {str(tracker): self._options(str(tracker), name, sweep) for tracker in accelerator.log_with}
        if "tensorboard" in options:  # its reader drops this step, and all later ones, of the files before
            options["tensorboard"] = {"purge_step": resumed + 1} if resumed is not None else {}
        accelerator.project_configuration.set_directories(str(folder / "logs"))
        accelerator.init_trackers("distopt", None, init_kwargs=options)
        flat = _flat(values)
        for tracker in accelerator.trackers:
            if main and tracker.name in _GIVEN_BY_SERVER:
                self._known[tracker.name]["id"] = tracker.tracker.info.run_id
            if tracker.name not in continued or tracker.name in _TAKE_CHANGES:
                tracker.store_init_configuration(flat)
        if main and accelerator.trackers:
            self._write()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values of a step; only the main process calls this."""
        for tracker in self._accelerator.trackers:
            if step > self._told(tracker.name):
                tracker.log(dict(values), step=step)

    def log_histograms(self, values: dict[str, list[float]], step: int) -> None:
        """Gives the trackers that have histograms the distribution of some quantities over layers, as log10.

        Args:
            values: The values of all layers by quantity; 0 and what is not finite is left out.
            step: The number of the step.
        """
        for tracker in self._accelerator.trackers:
            for name, found in values.items():
                logarithms = [log10(value) for value in found if isfinite(value) and value > 0.0]
                if not logarithms or step <= self._told(tracker.name):
                    continue
                if tracker.name == "tensorboard":
                    import numpy

                    tracker.writer.add_histogram(f"health/log10_{name}", numpy.array(logarithms), step)
                elif tracker.name == "wandb":
                    import wandb

                    now = max(step, tracker.tracker.step)  # norms are known one step late, and it drops what is late
                    tracker.tracker.log({f"health/log10_{name}": wandb.Histogram(logarithms)}, step=now)

    def go_back(self, step: int, done: int) -> None:
        """Forgets the steps after one, to which the run was rolled back; what only appends keeps those until `done`."""
        if not self._accelerator.is_main_process:
            return
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.close()
                tracker.writer.purge_step = step + 1  # for the file that it opens next
            else:
                self._known[tracker.name]["told"] = max(done, self._told(tracker.name))
        if self._accelerator.trackers:
            self._write()

    def _take_in(self, folder: Path, resumed: int) -> None:
        """Notes the last step that each tracker has; of the resumed step TensorBoard keeps the evaluation, if any."""
        rows = read_metrics(folder)
        last = max((row["step"] for row in rows), default=-1)
        evaluated = any(row["step"] == resumed and "validation_loss" in row for row in rows)
        for name, known in self._known.items():
            append = max(last, known.get("told", -1)) if name in _CONTINUES else -1
            known["told"] = (resumed if evaluated else resumed - 1) if name == "tensorboard" else append

    def _options(self, tracker: str, name: str, sweep: str | None) -> dict[str, Any]:
        """The arguments with which a tracker starts the run, or continues it."""
        if tracker not in _CONTINUES:
            self._known.setdefault(tracker, {})
            return {}
        own = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        if tracker == "wandb":  # an agent of W&B names the run
            own = os.environ.get("WANDB_RUN_ID", own)
        new = {"id": None if tracker in _GIVEN_BY_SERVER else own, "sweep": sweep}
        known = self._known.setdefault(tracker, new)
        group = known.get("sweep")
        return _CONTINUES[tracker](known.get("id"), f"{group}/{name}" if group else name, group)

    def _told(self, tracker: str) -> int:
        return int(self._known[tracker].get("told", -1))

    def _write(self) -> None:
        aside = self._file.with_suffix(".tmp")
        aside.write_text(json.dumps(self._known, indent=1) + "\n")
        aside.replace(self._file)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The trackers of the run before; none if it had none, or what is there is no such file."""
    try:
        found = json.loads(file.read_text())
        return {str(name): {**known} for name, known in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    from transformers.utils import flatten_dict

    scalars = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, scalars) else str(value) for name, value in flatten_dict(values).items()}
