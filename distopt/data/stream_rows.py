"""The documents of a file of rows from any position on; what a network loses is read again from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from distopt.data.rows import Row, need, text_of
from distopt.data.stream_files import StreamFile

TRIES = 6  # in a row without a document, after which reading has failed
PAUSE = 1.0  # seconds before the second try, doubled before each further one
_CHUNK = 1 << 20  # bytes


class Position(NamedTuple):
    """Where a row begins.

    Attributes:
        row: The number of the row, or of the line, from 0.
        byte: The offset of a line in the decompressed file; 0 in a table.
    """

    row: int = 0
    byte: int = 0


def documents(
    file: StreamFile, field: str, start: Position, wanted: Callable[[int], bool]
) -> Iterator[tuple[Position, bytes]]:
    """Yield the text of every wanted row from a position on, UTF-8, with the position of the row; of no empty one.

    If reading fails, the file is opened again and read on from the last document, `TRIES` times in a row at most.

    Args:
        file: The file.
        field: The field or column with the text.
        start: The position of the first row.
        wanted: Whether a row, by its number, is one to read.

    Raises:
        ValueError: The file cannot be read any more, or a row has no such text.
    """
    at, done, failures = start, start.row - 1, 0
    while True:

        def is_next(number: int, done: int = done) -> bool:
            return number > done and wanted(number)

        try:
            for position, row in _rows(file, field, at, is_next):
                text = text_of(row, field)
                at, done, failures = position, position.row, 0
                if text:
                    yield position, text
            return
        except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError) as error:
            raise ValueError(f"{file} cannot be read ({_line(error)})") from error
        except ValueError:
            raise
        except Exception as error:  # of the network, whose libraries have exceptions of their own
            failures += 1
            if failures == TRIES:
                raise ValueError(
                    f"{file} could not be read on from row {at.row}, {TRIES} times in a row ({_line(error)}): resume "
                    "with train.resume=auto once it can be"
                ) from error
            time.sleep(PAUSE * 2 ** (failures - 1))


def _rows(
    file: StreamFile, field: str, start: Position, wanted: Callable[[int], bool]
) -> Iterator[tuple[Position, Row]]:
    return (_table if file.is_table else _lines)(file, field, start, wanted)


def _lines(
    file: StreamFile, field: str, start: Position, wanted: Callable[[int], bool]
) -> Iterator[tuple[Position, Row]]:
    with file.open() as stream:
        if start.byte:
            stream.seek(start.byte)  # a compressed file is decompressed up to there
        row, byte, rest, ended = start.row, start.byte, b"", False
        while not ended:
            chunk = stream.read(_CHUNK)
            ended = not chunk
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines if not ended else [*lines, rest]:
                if wanted(row) and line.strip():
                    yield Position(row, byte), Row(f"{file.name}:{row + 1}", f"{file}:{row + 1}", line)
                row, byte = row + 1, byte + len(line) + 1


def _table(
    file: StreamFile, field: str, start: Position, wanted: Callable[[int], bool]
) -> Iterator[tuple[Position, Row]]:
    need("pyarrow", "parquet")
    import pyarrow
    from pyarrow import parquet

    try:
        # Without pre-buffering, which would hold a row group of all columns.
        with file.open() as stream, parquet.ParquetFile(stream, buffer_size=_CHUNK, pre_buffer=False) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names) or "none"
                raise ValueError(f"{file} has no column {field!r}; give field=<one of: {names}>")
            yield from _row_groups(file, table, field, start.row, wanted)
    except pyarrow.ArrowInvalid as error:  # a damaged file; what the network loses is an OSError
        raise ValueError(f"{file} cannot be read as Parquet ({_line(error)}): write it again") from error


def _row_groups(
    file: StreamFile, table: Any, field: str, start: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[Position, Row]]:
    """Yield the rows from `start` on, without reading the row groups before it."""
    row = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if row + count <= start:
            row += count
            continue
        for batch in table.iter_batches(256, row_groups=[group], columns=[field]):
            column = batch.column(0)
            for index in range(max(start - row, 0), len(column)):
                if wanted(row + index):
                    number = row + index
                    text = {field: column[index].as_py()}
                    yield Position(number), Row(f"{file.name}:{number}", f"{file} row {number}", text)
            row += len(column)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
