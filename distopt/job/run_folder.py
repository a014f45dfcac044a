"""A run's folder, the checkpoint it goes on from, and the command that starts it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distopt.job.metrics import METRICS, RUN


def open_folder(folder: Path, checkpoint: Path | None) -> str | None:
    """Makes a run's folder; an older run is moved aside unless its own checkpoint is gone on with.

    Returns a line that says so. Raises ValueError for a folder with something else in it, which is left alone.
    """
    moved = None
    gone_on_with = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
    entries = list(folder.iterdir()) if folder.is_dir() else []
    # What Hydra and its launcher put there before the run began: .hydra, .launch, launch.log.
    outer = [path.name for path in entries if path.name.startswith(".") or path.suffix == ".log"]
    if not gone_on_with and len(entries) > len(outer):
        if not any((folder / name).exists() for name in ("config.yaml", METRICS, "checkpoints")):
            raise ValueError(f"{folder} holds something that is no run: choose another name")
        number = 1
        while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
        folder.mkdir()
        for name in outer:
            (aside / name).rename(folder / name)
        moved = f"{folder} held an older run: moved to {aside}"
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def command(overrides: Sequence[str], processes: int, **changes: str) -> str:
    """The command line that starts this run with these overrides changed or added (`train__resume="auto"`)."""
    wanted = {name.replace("__", "."): value for name, value in changes.items()}
    kept = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") not in wanted]
    words = ["-m", "distopt.train", *kept, *(f"{name}={value}" for name, value in wanted.items())]
    if processes == 1:
        return shlex.join([program(Path(sys.executable).name), *words])
    local = Path("launch/local.yaml")
    where = ["--config_file", str(local)] if local.is_file() else ["--multi_gpu", "--main_process_port", "0"]
    return shlex.join([program("accelerate"), "launch", *where, "--num_processes", str(processes), *words])


def elsewhere(folder: Path, name: str) -> dict[str, str]:
    """What lets a command find a folder that is not that of its run's name: a sweep's, or one asked for."""
    if folder == Path("runs", name).absolute():
        return {}
    return {"hydra__mode": "RUN", "hydra__run__dir": f"'{folder}'"}


def write_about(folder: Path, command: str, choices: Mapping[str, str]) -> None:
    """Writes the command that starts this run, and the choices of its configuration, for `distopt.report`."""
    chosen = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    (folder / RUN).write_text(json.dumps({"command": command, "choices": chosen}, indent=1) + "\n")


def printable(text: str) -> str:
    """Text without what a terminal would take for a command: a model of bytes writes what it likes."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def program(name: str) -> str:
    """What a shell in this folder has to be given to start this Python's own program of that name."""
    own, found = Path(sys.executable).parent / name, shutil.which(name)
    if not own.is_file() or (found is not None and Path(found).parent == own.parent):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
