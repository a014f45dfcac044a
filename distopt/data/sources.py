"""Sources of text and of rows: which files a path means, read document by document in bounded pieces."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from distopt.bounds import FORMAT, PATH, PATTERN, or_null
from distopt.data import hub
from distopt.data.files import ABOUT, ENDINGS, Format, check_splits, find, format_of
from distopt.data.rows import READERS, Row, text_of

PIECE = 1 << 18  # bytes read and tokenized at once: longer documents are split into pieces, at line ends if possible


class Document(NamedTuple):
    """One document.

    Attributes:
        key: A name that is unique within the source.
        size: The size of the text in bytes.
        pieces: The text, UTF-8, in pieces that are read on iteration.
    """

    key: str
    size: int
    pieces: Iterable[bytes]


@dataclass(frozen=True)
class Source:
    """The files of a data source; `open` finds and checks them.

    Attributes:
        format: How the files are read.
        root: The file or folder that was given.
        files: The files, sorted by path.
        field: The JSONL field or the dataset column that contains the text.
    """

    format: Literal["stdlib"] | Format
    root: Path
    files: tuple[Path, ...]
    field: str

    @classmethod
    def open(
        cls,
        path: str | None,
        format: Format,
        suffixes: str | Sequence[str],
        field: str,
        *,
        pattern: str | None = None,
        key: str = "data.path",
    ) -> Source:
        """Find the files of a source without reading them; hidden files and folders are skipped.

        Args:
            path: A file, a folder (searched recursively), or the name of a dataset on the hub; None for the standard
                library of this Python.
            format: "auto" is what a file's ending says, datasets for a folder that `save_to_disk` wrote, and for
                another folder text, if it has such files, or else what its files' endings say; "ending" as well, of a
                path that is needed.
            suffixes: File name endings that "text" reads from a folder; none if there is to be no text.
            field: The field or column that contains the text.
            pattern: A pattern of the files' paths within the folder; None for all.
            key: The option of the path, for messages.

        Raises:
            ValueError: An argument is invalid, or there is nothing to read.
        """
        FORMAT.check("data.format", format)
        or_null(PATTERN).check("data.files", pattern)
        if path is None:
            if format != "auto":
                raise ValueError(f"data format {format!r} needs a path, got None; give {key}=<file or folder>")
            root = Path(sysconfig.get_paths()["stdlib"])
            return cls("stdlib", root, find(root, ".py", skip=("site-packages", "dist-packages")), field)
        PATH.check(key, path, "give a file or folder")
        from_hub = hub.is_name(path, hub.DATA)
        located = hub.folder(key, path, hub.DATA, [pattern] if pattern else [])
        root = Path(os.path.abspath(located))  # not resolve(): a link's own name has the suffix
        if not root.exists():
            raise ValueError(f"{key}={root} does not exist; give a file or folder")
        if pattern is not None and root.is_file():
            raise ValueError(f"data.files={pattern} selects files of a folder, and {root} is a file; leave it out")
        if format in ("auto", "ending"):
            format = format_of(root, suffixes, pattern)
        wanted = suffixes if format == "text" else ENDINGS[format]
        files = find(root, wanted, pattern=pattern)
        if root.is_dir() and format not in ("text", "datasets"):
            files = tuple(file for file in files if not ABOUT.fullmatch(file.name))
        if from_hub and pattern is None:
            check_splits(path, root, files)
        if not any(file.stat().st_size for file in files):
            kind = f"non-empty {format} file" + (f" ending in {wanted}" if root.is_dir() and wanted else "")
            within = f" whose path fits data.files={pattern}" if pattern else ""
            raise ValueError(
                f"{key}={root} contains no {kind}{within}; give another path, data.suffixes or data.format"
            )
        return cls(format, root, files, field)

    def documents(self) -> Iterator[Document]:
        """Yield every non-empty document in a fixed order; its pieces are read only on iteration.

        The key of a document is the path of its file relative to the root, `path:line` for rows of a file, and the row
        index for a dataset.

        Raises:
            ValueError: A file cannot be read as the format of the source.
        """
        read = self._text if self.format in ("stdlib", "text") else self._fields
        return (document for document in read() if document.size)

    def rows(self, columns: Sequence[str] = ()) -> Iterator[Row]:
        """Yield every row of the files, of which only some columns are needed; all if there are none."""
        read = READERS[self.format]
        if self.format == "datasets":
            yield from read(self.root, "", columns)
            return
        for file in self.files:
            if file.stat().st_size:
                yield from read(file, self._key(file), columns)

    def fingerprint(self) -> str:
        """Hash what determines the documents: format, root, field, and the path, size and mtime of every file."""
        digest = hashlib.blake2b(f"{self.format}\0{self.root}\0{self.field}".encode(errors="surrogateescape"))
        for file in self.files:
            stat = file.stat()
            digest.update(f"\0{self._key(file)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def size(self) -> int | None:
        """The size of the text in bytes; None if it is unknown before reading."""
        return sum(file.stat().st_size for file in self.files) if self.format in ("stdlib", "text") else None

    def __str__(self) -> str:
        return f"{self.format}: {hub.origin(self.root)} ({len(self.files)} files)"

    def _key(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if file != self.root else file.name

    def _text(self) -> Iterator[Document]:
        for file in self.files:
            # The standard library's tests of its decoders include a few files in Latin-1 or KOI8-R.
            if self.format == "stdlib" and not _is_utf8(file):
                continue
            yield Document(self._key(file), file.stat().st_size, _pieces(file))

    def _fields(self) -> Iterator[Document]:
        for row in self.rows([self.field]):
            text = text_of(row, self.field)
            yield Document(row.key, len(text), split_text(text))


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _pieces(file: Path) -> Iterator[bytes]:
    """Read a UTF-8 file in pieces of whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, ended = 0, False
    with file.open("rb") as stream:
        while not ended:
            # Extended to the end of the line, so that pieces rarely split a token; an endless line is split anyway.
            raw = stream.read(PIECE) + stream.readline(PIECE)
            ended = not raw
            try:
                piece = decoder.decode(raw, final=ended).encode()
            except UnicodeDecodeError as error:
                where = f"byte {offset + error.start}"
                raise ValueError(f"{file} is not UTF-8 at {where}; convert it, or exclude it from path") from None
            offset += len(piece)
            if piece:
                yield piece


def split_text(text: bytes) -> Iterator[bytes]:
    """Split a text into pieces of at most `PIECE` bytes, at a line end if possible."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind(b"\n", start, start + PIECE) + 1 or character_start(text, start + PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def character_start(text: bytes, index: int) -> int:
    """Return the index of the first byte of the UTF-8 character that contains byte `index`."""
    while 0 < index < len(text) and text[index] & 0xC0 == 0x80:
        index -= 1
    return index
