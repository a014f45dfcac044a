"""Files of rows that are read where they are: of this machine, of a URL of fsspec, or of a dataset on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from distopt.bounds import PATH, PATTERN, or_null
from distopt.data import hub
from distopt.data.files import ABOUT, check_splits

LINES, TABLES = (".jsonl", ".json"), (".parquet",)
COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")  # of lines; a Parquet file is compressed within
_ENDINGS = tuple(ending + compressed for ending in LINES for compressed in COMPRESSED) + TABLES


@dataclass(frozen=True)
class StreamFile:
    """A file of rows, wherever it is.

    Attributes:
        filesystem: The file system of fsspec that has it.
        path: Its path there.
        name: Its path within the folder that was given, for keys and messages.
        size: Its size in bytes; None if the file system does not tell.
    """

    filesystem: Any
    path: str
    name: str
    size: int | None

    @property
    def is_table(self) -> bool:
        """Whether it is a Parquet file; else it has one JSON object per line."""
        return self.path.endswith(TABLES)

    def open(self) -> Any:
        """Open the file for reading bytes, decompressed."""
        from fsspec.core import OpenFile, get_compression

        compression = None if self.is_table else get_compression(self.path, "infer")
        if compression is None and not self.is_table and not self.path.endswith(LINES):
            ending = PurePosixPath(self.path).suffix
            raise ValueError(
                f"{self} cannot be decompressed here: a {ending} file needs zstandard; pip install zstandard"
            )
        return OpenFile(self.filesystem, self.path, "rb", compression=compression)

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path)).removeprefix("file://")


@dataclass(frozen=True)
class StreamFiles:
    """The files of a stream, sorted by path.

    Attributes:
        files: The files.
        origin: Where others find them, for users.
        version: What identifies their contents: a commit of the hub, or names and sizes.
    """

    files: tuple[StreamFile, ...]
    origin: str
    version: str

    @classmethod
    def find(cls, path: str | None, pattern: str | None = None, key: str = "data.path") -> StreamFiles:
        """Find the files of a stream without reading them.

        Args:
            path: A file, a folder (searched recursively), the URL of either, or the name of a dataset on the hub.
            pattern: A pattern of the files' paths within the folder; None for all.
            key: The option of the path, for messages.

        Raises:
            ValueError: There is nothing that can be streamed, or it cannot be reached.
        """
        PATH.check(key, path, "give a file or folder, its URL, or the name of a dataset on the hub")
        or_null(PATTERN).check("data.files", pattern)
        assert path is not None
        on_hub = "://" not in path and hub.is_name(path, hub.DATA)
        found, origin, commit = _on_hub(key, path) if on_hub else _listed(key, path)
        chosen = [file for file in found if pattern is None or fnmatch(file.name, pattern)]
        files = [file for file in chosen if file.name.endswith(_ENDINGS) and file.size != 0]
        files = sorted((file for file in files if not _about(file.name)), key=lambda file: file.name)
        if not files:
            endings = sorted({PurePosixPath(file.name).suffix or file.name for file in chosen})[:4]
            there = f"{', '.join(endings)} there" if endings else "none there"
            within = f" whose path fits data.files={pattern}" if pattern else ""
            raise ValueError(
                f"{key}={path} has no file of rows to stream{within}, .jsonl or .parquet ({there}): data=text prepares "
                "other formats"
            )
        if len({file.is_table for file in files}) > 1:
            raise ValueError(f"{key}={path} has files of lines and of Parquet; give data.files, such as '*.parquet'")
        if on_hub and pattern is None:
            check_splits(path, Path("/"), [Path("/", file.name) for file in files])
        version = commit or repr([(file.name, file.size) for file in files])
        return cls(tuple(files), origin, version)


def _about(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(ABOUT.fullmatch(parts[-1])) or any(part.startswith(".") for part in parts)


def _on_hub(key: str, value: str) -> tuple[Sequence[StreamFile], str, str]:
    from huggingface_hub import HfFileSystem

    name, commit, names = hub.listing(key, value)
    filesystem = HfFileSystem()
    return [StreamFile(filesystem, f"datasets/{name}@{commit}/{file}", file, None) for file in names], name, commit


def _listed(key: str, value: str) -> tuple[Sequence[StreamFile], str, str]:
    from fsspec.core import url_to_fs

    place = value if "://" in value else os.path.abspath(os.path.expanduser(value))
    try:
        filesystem, root = url_to_fs(place)
        # A server of HTTP has no folders, and would send the whole of a file that is asked whether it is one.
        if root.endswith(_ENDINGS) and not ("://" not in value and os.path.isdir(place)):
            infos = {root: filesystem.info(root)}
        else:
            infos = filesystem.find(root, detail=True)
            if not infos and not filesystem.exists(root):
                raise FileNotFoundError
    except FileNotFoundError:
        raise ValueError(f"{key}={value} does not exist; give a file or folder, or its URL") from None
    except Exception as error:  # of the network, and of protocols that are unknown or need a package
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{key}={value} cannot be listed ({reason})") from error
    files = []
    for path, info in infos.items():
        if info.get("type") != "directory":
            name = PurePosixPath(path).name if path == root else str(path).removeprefix(root).strip("/")
            files.append(StreamFile(filesystem, str(path), name, info.get("size")))
    return files, place, ""
