"""The experiment trackers of Accelerate that a run logs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


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


def start_trackers(accelerator: Accelerator, folder: str, run: str, values: dict[str, Any]) -> None:
    """Starts the trackers in `accelerator.log_with`.

    Args:
        accelerator: Its main process writes.
        folder: Where trackers that write files put them.
        run: The name of the run.
        values: The composed configuration, nested; lists are logged as text.
    """
    from transformers.utils import flatten_dict

    scalars = (bool, int, float, str, type(None))
    flat = {name: value if isinstance(value, scalars) else str(value) for name, value in flatten_dict(values).items()}
    accelerator.project_configuration.set_directories(folder)
    accelerator.init_trackers("distopt", flat, init_kwargs={"wandb": {"name": run}})


def log_histograms(accelerator: Accelerator, values: dict[str, list[float]], step: int) -> None:
    """Gives the trackers that have histograms the distribution of some quantities over layers, as log10.

    Args:
        accelerator: With the trackers; only the main process calls this.
        values: The values of all layers by quantity; 0 and what is not finite is left out.
        step: The number of the step.
    """
    from math import isfinite, log10

    for tracker in accelerator.trackers:
        for name, found in values.items():
            logarithms = [log10(value) for value in found if isfinite(value) and value > 0.0]
            if not logarithms:
                continue
            if tracker.name == "tensorboard":
                import numpy

                tracker.writer.add_histogram(f"health/log10_{name}", numpy.array(logarithms), step)
            elif tracker.name == "wandb":
                import wandb

                tracker.tracker.log({f"health/log10_{name}": wandb.Histogram(logarithms)}, step=step)
