"""What a run is, for its report: `run.json` has its command, its choices, and what trains on what and where."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig

from distopt.job import run_folder
from distopt.job.device import unsharded_numel
from distopt.job.records import RUN
from distopt.version import __version__

if TYPE_CHECKING:
    from distopt.job.job import Job


def write_about(job: Job) -> None:
    """Writes `run.json`, before the first step; a run that is resumed keeps the time at which it began.

    Args:
        job: The job, on its main process.
    """
    file, choices = job.folder / RUN, HydraConfig.get().runtime.choices
    about = {
        "command": run_folder.command(job.accelerator.num_processes, job.folder, str(job.cfg.name)),
        "choices": {group: choice for group, choice in choices.items() if not group.startswith("hydra")},
        "init": job.identity.get("init"),
        **facts(job),
    }
    if job.step and (began := _began(file)):
        about["began"] = began
    _write(file, about)


def write_stopped(job: Job) -> None:
    """Adds to `run.json` why a callback has ended the run, on its main process."""
    file = job.folder / RUN
    _write(file, {**json.loads(file.read_text()), "stopped_early": job.callbacks.stopped})


def _write(file: Path, about: dict[str, Any]) -> None:
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(about, indent=1) + "\n")
    aside.replace(file)  # a report that watches the run reads it meanwhile


def facts(job: Job) -> dict[str, Any]:
    """Returns what a table of runs shows of a run beside its configuration."""
    device, tokenizer = job.accelerator.device, job.cfg.data.get("tokenizer")
    return {
        "model": f"{job.config.model_type}" + (f", {Path(path).name}" if (path := job.cfg.model.get("path")) else ""),
        "parameters": sum(map(unsharded_numel, job.engine.unwrap(job.model).parameters())),
        "data": job.corpus.source,
        "tokenizer": "bytes" if tokenizer is None else str(tokenizer),
        "digest": job.corpus.digest,
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processes": job.accelerator.num_processes,
        "version": __version__,
        "commit": commit(Path.cwd()),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(folder: Path) -> str:
    """Returns the commit of the repository that a folder is in, with "-dirty" for changes to it; "" without one."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        found = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _began(file: Path) -> str | None:
    """The time at which the run began that a file is about, if it tells one."""
    try:
        began = json.loads(file.read_text())["began"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return began if isinstance(began, str) else None
