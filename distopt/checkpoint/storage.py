"""The folder of a checkpoint: on a local file system, or anywhere that fsspec reaches (`s3://bucket/run`)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PathLike = str | os.PathLike[str]
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_url(path: PathLike) -> bool:
    """Returns whether a path is a URL and not a path of this machine."""
    return bool(_URL.match(str(path)))


def join(path: PathLike, name: str) -> Path | str:
    """Returns the path of a name in a folder: text for a URL, whose `//` a Path would lose."""
    return f"{str(path).rstrip('/')}/{name}" if is_url(path) else Path(path) / name


def storage(path: PathLike) -> Storage:
    """Returns the storage of a path.

    Raises:
        ValueError: If the protocol of a URL is unknown, or its package is not installed.
    """
    return RemoteStorage(str(path)) if is_url(path) else Storage(path)


class Storage:
    """The files of one folder, whose contents are on disk when they are closed.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = path
        self._root = Path(path)

    def folder(self, name: str) -> Storage:
        """Returns the storage of a folder within this one."""
        return storage(join(self.path, name))

    def names(self) -> list[str]:
        """Returns the names of files and folders, sorted; nothing where there is no such folder."""
        try:
            return sorted(os.listdir(self._root))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self) -> bool:
        """Returns whether there is something of this path."""
        return os.path.lexists(self._root)

    def is_folder(self) -> bool:
        """Returns whether there is a folder of this path."""
        return self._root.is_dir()

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None unless it is a regular file, which a link is not."""
        try:
            status = os.lstat(self._root / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading bytes."""
        return open(self._root / name, "rb")

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file."""
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Opens a file for writing bytes."""
        with open(self._root / name, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file of this name at once: readers find the old one, or the new one."""
        with self.create(f"{name}.new") as file:
            file.write(data)
        os.replace(self._root / f"{name}.new", self._root / name)
        self.sync()

    def make(self) -> None:
        """Creates the folder."""
        self._root.mkdir(parents=True, exist_ok=True)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder in this one; the folder itself without a name. Links are not followed."""
        path = self._root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Makes the entries of the folder durable, as fsync does for the contents of a file."""
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RemoteStorage(Storage):
    """The files of one folder on a file system of fsspec, on which a file appears as a whole when it is closed."""

    def __init__(self, path: str) -> None:
        from fsspec.core import url_to_fs

        super().__init__(path)
        try:
            self._fs: Any
            self._fs, self._at = url_to_fs(path.rstrip("/"))
        except (ValueError, ImportError) as error:
            raise ValueError(f"{path} cannot be opened ({error}): give a local path or a URL of fsspec") from error

    def names(self) -> list[str]:
        """Returns the names of files and folders, sorted; nothing where there is no such folder."""
        self._fs.invalidate_cache()
        try:
            found = [str(entry).rstrip("/") for entry in self._fs.ls(self._at, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rpartition("/")[2] for entry in found)

    def exists(self) -> bool:
        """Returns whether there is something of this path."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._at))

    def is_folder(self) -> bool:
        """Returns whether there is a folder of this path."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._at))

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None unless there is such a file."""
        path = f"{self._at}/{name}"
        return int(self._fs.size(path)) if self._fs.isfile(path) else None

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading bytes."""
        file: IO[bytes] = self._fs.open(f"{self._at}/{name}", "rb")
        return file

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Opens a file for writing bytes."""
        with self._fs.open(f"{self._at}/{name}", "wb") as file:
            yield file

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file of this name at once: readers find the old one, or the new one."""
        with self.create(name) as file:
            file.write(data)

    def make(self) -> None:
        """Creates the folder."""
        self._fs.makedirs(self._at, exist_ok=True)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder in this one; the folder itself without a name."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._at}/{name}".rstrip("/"), recursive=True)

    def sync(self) -> None:
        """Does nothing: what is closed is stored."""
