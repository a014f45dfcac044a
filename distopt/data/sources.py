"""Sources of text: text files, JSONL files and dataset folders, read document by document in bounded pieces."""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distopt.bounds import FORMAT, PATH

Format = Literal["auto", "text", "jsonl", "datasets"]
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


class Line(NamedTuple):
    """One line of a JSONL file.

    Attributes:
        key: A name that is unique within the source.
        where: The file and the line number, for error messages.
        content: The bytes of the line.
    """

    key: str
    where: str
    content: bytes


@dataclass(frozen=True)
class Source:
    """The files of a data source; `open` finds and checks them.

    Attributes:
        format: How the files are read.
        root: The file or folder that was given.
        files: The files, sorted by path.
        field: The JSONL field or the dataset column that contains the text.
    """

    format: Literal["stdlib", "text", "jsonl", "datasets"]
    root: Path
    files: tuple[Path, ...]
    field: str

    @classmethod
    def open(cls, path: str | None, format: Format, suffixes: str | Sequence[str], field: str) -> Source:
        """Find the files of a source without reading them; hidden files and folders are skipped.

        Args:
            path: A file or a folder (searched recursively); None for the standard library of this Python.
            format: "auto" is jsonl for a .jsonl file, datasets for a folder that `save_to_disk` wrote, text for
                anything else.
            suffixes: File name endings that "text" reads from a folder.
            field: The JSONL field or the dataset column that contains the text.

        Raises:
            ValueError: An argument is invalid, or there is nothing to read.
        """
        FORMAT.check("data.format", format)
        if path is None:
            if format != "auto":
                raise ValueError(f"data format {format!r} needs a path, got None; give path=<file or folder>")
            root = Path(sysconfig.get_paths()["stdlib"])
            return cls("stdlib", root, _find(root, ".py", skip=("site-packages", "dist-packages")), field)
        PATH.check("data.path", path, "give path=<file or folder>")
        root = Path(os.path.abspath(Path(path).expanduser()))  # not resolve(): a link's own name has the suffix
        if not root.exists():
            raise ValueError(f"data path {root} does not exist; give path=<file or folder>")
        if format == "auto":
            saved = (root / "state.json").is_file() or (root / "dataset_dict.json").is_file()
            format = "datasets" if saved else "jsonl" if root.suffix == ".jsonl" else "text"
        wanted = {"text": suffixes, "jsonl": ".jsonl", "datasets": ""}[format]
        files = _find(root, wanted)
        if not any(file.stat().st_size for file in files):
            kind = f"non-empty {format} file" + (f" ending in {wanted}" if root.is_dir() and wanted else "")
            raise ValueError(f"data path {root} contains no {kind}; give another path, suffixes or format")
        return cls(format, root, files, field)

    def documents(self) -> Iterator[Document]:
        """Yield every non-empty document in a fixed order; its pieces are read only on iteration.

        The key of a document is the path of its file relative to the root, `path:line` for JSONL, and the row index for
        a dataset.

        Raises:
            ValueError: A file cannot be read as the format of the source.
        """
        read = {"stdlib": self._text, "text": self._text, "jsonl": self._jsonl, "datasets": self._datasets}[self.format]
        return (document for document in read() if document.size)

    def lines(self) -> Iterator[Line]:
        """Yield every line of the JSONL files that is not blank."""
        for file in self.files:
            with file.open("rb") as stream:
                for number, content in enumerate(stream, start=1):
                    if content.strip():
                        yield Line(f"{self._key(file)}:{number}", f"{file}:{number}", content)

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
        return f"{self.format}: {self.root} ({len(self.files)} files)"

    def _key(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if file != self.root else file.name

    def _text(self) -> Iterator[Document]:
        for file in self.files:
            # The standard library's tests of its decoders include a few files in Latin-1 or KOI8-R.
            if self.format == "stdlib" and not _is_utf8(file):
                continue
            yield Document(self._key(file), file.stat().st_size, _pieces(file))

    def _jsonl(self) -> Iterator[Document]:
        for line in self.lines():
            text = _field_of(line.content, self.field, line.where)
            yield Document(line.key, len(text), _split(text))

    def _datasets(self) -> Iterator[Document]:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("data format 'datasets' needs the datasets package; pip install distopt[data]")
        import datasets

        if (self.root / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(folder.name for folder in self.root.iterdir() if folder.is_dir()))
            raise ValueError(f"{self.root} holds several datasets ({splits}); give the path of one of these folders")
        if (self.root / "state.json").is_file() and not any(self.root.glob("*.arrow")):
            raise ValueError(f"{self.root} is a dataset without rows; give another path")
        try:
            dataset = datasets.load_from_disk(str(self.root))
        except Exception as error:  # of any class, by what of the folder is damaged
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{self.root} is not a folder that datasets' save_to_disk wrote ({reason})") from None
        if self.field not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise ValueError(f"{self.root} has no column {self.field!r}; give field=<one of: {columns}>")
        for index, row in enumerate(dataset.select_columns([self.field])):
            if not isinstance(row[self.field], str):
                raise ValueError(
                    f"{self.root} row {index}: column {self.field!r} must be text, got {row[self.field]!r:.40}"
                )
            text = row[self.field].encode()
            yield Document(str(index), len(text), _split(text))


def _find(root: Path, suffixes: str | Sequence[str], skip: Sequence[str] = ()) -> tuple[Path, ...]:
    if root.is_file():
        return (root,)
    endings = suffixes if isinstance(suffixes, str) else tuple(suffixes)
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if name.endswith(endings) and not name.startswith(".")]
    return tuple(sorted(file for file in found if file.is_file()))


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


def _split(text: bytes) -> Iterator[bytes]:
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


def parse_json(line: bytes, where: str) -> Any:
    """Parse a line of JSON; raise `ValueError`, with the file and line of `where`, if it is malformed."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not UTF-8 JSON ({reason}); one JSON object per line is needed") from None


def _field_of(line: bytes, field: str, where: str) -> bytes:
    """Return the text of a field of a JSONL line, UTF-8."""
    record = parse_json(line, where)
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text under {field!r} (found: {found}); give field=<name>")
    # JSON may escape a lone surrogate, which UTF-8 cannot encode: it becomes a question mark.
    return record[field].encode(errors="replace")
