"""A run's folder, and the command that starts or resumes the run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distopt.job.config import CONF
from distopt.job.records import METRICS


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
    resumed = checkpoint is not None and is_own(folder, checkpoint)
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


def is_own(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run in this folder."""
    # By their targets: the checkpoints, or the run, may have been moved to another disk, with a link in their place.
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def sweep() -> str | None:
    """The name of the sweep whose job this run of Hydra is; None for a run of its own."""
    hydra = HydraConfig.get()
    return None if OmegaConf.is_missing(hydra.job, "num") else Path(str(hydra.sweep.dir)).name


def command(processes: int, folder: Path, name: str, **changes: str) -> str:
    """Returns the command line that starts this run of Hydra again, as a person would type it.

    Args:
        processes: The number of processes.
        folder: The run's folder, which the command names unless it is runs/<name>.
        name: The name of the run.
        changes: Overrides to change or add, with `__` for a dot: `train__resume="auto"`.
    """
    wanted = {key.replace("__", "."): value for key, value in changes.items()}
    given, flags = [*HydraConfig.get().overrides.task], _flags()
    if folder != Path("runs", name).absolute():  # of a sweep, or set by hydra.run.dir
        wanted |= {"hydra.mode": "RUN"} if any(word.startswith("experiment=") for word in given) else {}
        wanted["hydra.run.dir"] = _quoted(near(folder))
    given = [word.removeprefix("++") if word.startswith("++model.config") else word for word in given]  # model_words
    kept = [word for word in given if word.split("=", 1)[0].lstrip("+~") not in wanted and word != "~model.config"]
    alone = str(processes) == os.environ.get("LOCAL_WORLD_SIZE")  # other launchers start those of several machines
    implied = {"train.steps=null"} | {"model=pretrained" for word in kept if word.startswith("model.path=")}
    kept = [word for word in kept if word not in implied]
    options = ["--processes", str(processes)] if processes > 1 and alone else []
    words = ["train", *options, *flags, *kept, *(f"{key}={value}" for key, value in wanted.items())]
    return " ".join([*_distopt(), *map(_typed, words)])


def _flags() -> list[str]:
    """The words of this run that are Hydra's own and no part of a sweep: where the configuration is, and how to run."""
    hydra, words = HydraConfig.get(), []
    for source in hydra.runtime.config_sources:
        own = source.schema == "file" and Path(source.path).resolve() == CONF.resolve()
        if source.provider in ("main", "command-line") and not own:
            words += ["--config-dir" if source.provider == "command-line" else "--config-path", near(source.path)]
    if hydra.job.config_name != "train":
        words += ["--config-name", str(hydra.job.config_name)]
    return words + [word for word in hydra.overrides.hydra if not _OF_A_SWEEP.match(word)]


# What names the folder, and what a sweep, or its launcher, gives to each of its jobs.
_OF_A_SWEEP = re.compile(
    r"[+~]*hydra([./]launcher|[./]sweeper|\.mode|\.run\.dir|\.sweep|\.job\.(num|id)|\.callbacks\.accelerate_launcher)\b"
)


def _distopt() -> list[str]:
    """The words by which a shell in the current folder starts distopt."""
    if (Path(sys.executable).parent / "distopt").is_file():
        return [program("distopt")]
    return [program(Path(sys.executable).name), "-m", "distopt"]


def near(path: Path | str) -> str:
    """A path as seen from the current folder, if it is in there."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def _quoted(value: str) -> str:
    """A value for Hydra's grammar, in quotes if it needs some."""
    if re.fullmatch(r"[\w./@+-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _typed(word: str) -> str:
    """A word for a shell, in double quotes if these suffice."""
    if "'" in word and not set('"$`\\!') & set(word):
        return f'"{word}"'
    return shlex.quote(word)


def printable(text: str) -> str:
    """Replaces the characters that a terminal could take for commands: a model of bytes may write any."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def program(name: str) -> str:
    """The word by which a shell in the current folder starts this Python's own program of a name."""
    own, found = Path(sys.executable).parent / name, shutil.which(name)
    if not own.is_file() or (found is not None and Path(found).parent == own.parent):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
