"""A run's folder, and the command that starts or resumes the run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distopt.job.metrics import METRICS, RUN


def open_folder(folder: Path, checkpoint: Path | None) -> str | None:
    """Makes a run's folder; an older run there is moved aside unless the new run resumes from its checkpoint.

    Args:
        folder: The run's folder.
        checkpoint: The checkpoint that the run resumes from, if any.

    Returns:
        A line about the older run, if one was moved.

    Raises:
        ValueError: For a folder with something else in it, which is left as it is.
    """
    moved = None
    # By their targets: the checkpoints, or the run, may have been moved to another disk, with a link in their place.
    resumed = checkpoint is not None and checkpoint.resolve().parent == (folder / "checkpoints").resolve()
    entries = list(folder.iterdir()) if folder.is_dir() else []
    # Hydra and its launcher write there before the run starts: .hydra, .launch, launch.log.
    outer = [path.name for path in entries if path.name.startswith(".") or path.suffix == ".log"]
    if not resumed and len(entries) > len(outer):
        if not any((folder / name).exists() for name in ("config.yaml", METRICS, "checkpoints")):
            raise ValueError(f"{folder} contains something that is no run: choose another name")
        number = 1
        while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
        folder.mkdir()
        for name in outer:
            (aside / name).rename(folder / name)
        moved = f"{folder} contained an older run: moved to {aside}"
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def command(overrides: Sequence[str], processes: int, **changes: str) -> str:
    """Returns the command line that starts a run.

    Args:
        overrides: The overrides of this run.
        processes: The number of processes.
        changes: Overrides to change or add, with `__` for a dot: `train__resume="auto"`.
    """
    wanted = {name.replace("__", "."): value for name, value in changes.items()}
    kept = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") not in wanted]
    words = ["-m", "distopt.train", *kept, *(f"{name}={value}" for name, value in wanted.items())]
    if processes == 1:
        return shlex.join([program(Path(sys.executable).name), *words])
    local = Path("launch/local.yaml")
    where = ["--config_file", str(local)] if local.is_file() else ["--multi_gpu", "--main_process_port", "0"]
    return shlex.join([program("accelerate"), "launch", *where, "--num_processes", str(processes), *words])


def elsewhere(folder: Path, name: str) -> dict[str, str]:
    """The changes with which `command` finds a folder other than runs/<name>: of a sweep, or set by hydra.run.dir."""
    if folder == Path("runs", name).absolute():
        return {}
    return {"hydra__mode": "RUN", "hydra__run__dir": f"'{folder}'"}


def write_about(folder: Path, command: str, choices: Mapping[str, str]) -> None:
    """Writes a run's command and the choices of its groups to `run.json`, for `distopt.report`."""
    chosen = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    (folder / RUN).write_text(json.dumps({"command": command, "choices": chosen}, indent=1) + "\n")


def printable(text: str) -> str:
    """Replaces the characters that a terminal could take for commands: a model of bytes may write any."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def program(name: str) -> str:
    """The word by which a shell in the current folder starts this Python's own program of a name."""
    own, found = Path(sys.executable).parent / name, shutil.which(name)
    if not own.is_file() or (found is not None and Path(found).parent == own.parent):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
