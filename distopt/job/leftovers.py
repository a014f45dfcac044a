"""What a run, or a sweep, that is refused leaves behind: nothing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

# What Hydra, the lock of a run and the launcher of a sweep write before anything else can refuse.
_FIRST = {"multirun.yaml", ".launch.lock", ".lock", ".owner.json"}
_new: list[Path] = []  # the folder, and those above it, that were not there when this process began


class Before(Callback):
    """Hydra's callback that notes which folders are not there yet; Hydra makes them before it calls the program."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes those of a run."""
        _note(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes those of a sweep."""
        _note(config, "hydra.sweep.dir")


@contextlib.contextmanager
def no_leftovers() -> Iterator[None]:
    """Removes, after an error in its body, the folders that are new if no run has begun in them."""
    try:
        yield
    except Exception:
        clear()
        raise


def _note(config: DictConfig, key: str) -> None:
    folder = Path(str(OmegaConf.select(config, key))).absolute()
    _new[:] = [path for path in (folder, *folder.parents) if not path.exists()]


def clear() -> None:
    """Removes the new folders, unless something else is in them, or another job holds them."""
    if not _new:
        return
    folder, *above = _new
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    if all(path.name in _FIRST and not _is_others(path) for path in files):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run is in there
            for parent in above:
                parent.rmdir()


def _is_others(file: Path) -> bool:
    if file.name != ".lock":
        return False
    from distopt.job.run_lock import is_mine  # it imports torch, which has been there if there is a lock

    return not is_mine(file)
