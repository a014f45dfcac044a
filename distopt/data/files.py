"""Which files of a folder are data, and what their endings say of how they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

Format = Literal["auto", "ending", "text", "jsonl", "json", "csv", "parquet", "datasets"]
ENDINGS: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl",),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "datasets": ("",),
}
ABOUT = re.compile(r"(readme|licen[cs]e|notice|dataset_infos?)\b.*", re.IGNORECASE)  # files about the others
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


def format_of(root: Path, suffixes: str | Sequence[str], pattern: str | None) -> Format:
    """Return the format of a file or folder."""
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        return "datasets"
    formats: tuple[Format, ...] = ("jsonl", "json", "csv", "parquet")
    if root.is_file():
        found = [format for format in formats if root.name.endswith(ENDINGS[format])]
        return found[0] if found else "text" if suffixes else "jsonl"
    files = [file for file in find(root, "", pattern=pattern) if not ABOUT.fullmatch(file.name)]
    endings = suffixes if isinstance(suffixes, str) else tuple(suffixes)
    if endings and any(file.name.endswith(endings) for file in files):
        return "text"
    found = [format for format in formats if any(file.name.endswith(ENDINGS[format]) for file in files)]
    if len(found) > 1:
        raise ValueError(f"data path {root} has files of {' and '.join(found)}; give data.files, such as *.{found[0]}")
    return found[0] if found else "text" if suffixes else "jsonl"


def check_splits(name: str, root: Path, files: Sequence[Path]) -> None:
    """Raise `ValueError` if files of a dataset on the hub are of several splits, to be chosen from."""
    words = {word for file in files for word in re.split("[^a-z]+", file.relative_to(root).as_posix().lower())}
    if len(splits := [split for split in _SPLITS if split in words]) > 1:
        raise ValueError(
            f"data.path={name} has files of {', '.join(splits)}: give data.files, a pattern of those to read, such as "
            f"'*{splits[0]}*'"
        )


def find(
    root: Path, suffixes: str | Sequence[str], skip: Sequence[str] = (), pattern: str | None = None
) -> tuple[Path, ...]:
    """Return the files of a folder with one of some endings, sorted; of a file itself.

    Args:
        root: The file or folder; what is hidden in it is skipped.
        suffixes: The endings.
        skip: Names of folders to leave out.
        pattern: A pattern of the files' paths within the folder; None for all.
    """
    if root.is_file():
        return (root,)
    endings = suffixes if isinstance(suffixes, str) else tuple(suffixes)
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if name.endswith(endings) and not name.startswith(".")]
    if pattern is not None:
        found = [file for file in found if fnmatch(file.relative_to(root).as_posix(), pattern)]
    return tuple(sorted(file for file in found if file.is_file()))
