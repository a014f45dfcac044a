"""Rows of a table, read one by one: JSONL, JSON, CSV and Parquet files, and folders that `datasets` saved."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        key: A name that is unique within the source.
        where: The file and the line or row number, for error messages.
        content: The values by name, or a line of JSON that has them.
    """

    key: str
    where: str
    content: bytes | Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the values by name; raise `ValueError` if the line is no JSON object."""
        record = parse_json(self.content, self.where) if isinstance(self.content, bytes) else self.content
        if not isinstance(record, Mapping):
            raise ValueError(f"{self.where} is a {type(record).__name__}, not an object with fields by name")
        return dict(record)


# Yields the rows of a file or folder, given the name for their keys and the columns to read, all if there are none.
Reader = Callable[[Path, str, Sequence[str]], Iterator[Row]]


def parse_json(line: bytes, where: str) -> Any:
    """Parse JSON; raise `ValueError`, with the file and line of `where`, if it is malformed."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not UTF-8 JSON ({reason}); one JSON object per line is needed") from None


def read_jsonl(file: Path, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every line that is not blank, unparsed."""
    with file.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            if content.strip():
                yield Row(f"{name}:{number}", f"{file}:{number}", content)


def read_json(file: Path, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every object of a file that is one list of them; the file is read into memory."""
    try:
        rows = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not UTF-8 JSON ({reason}); lines of JSON belong into a .jsonl file") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} is a {type(rows).__name__}, not a list of objects")
    for index, row in enumerate(rows):
        where = f"{file} row {index}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}, not an object with fields by name")
        yield Row(f"{name}:{index}", where, row)


def read_csv(file: Path, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every row after the line with the names of the columns; a .tsv file is separated by tabs."""
    csv.field_size_limit(sys.maxsize)  # of the process; by default a field of more than 128 KiB is refused
    delimiter = "\t" if file.suffix == ".tsv" else ","
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(rows, [])
            if repeated := [column for column in header if header.count(column) > 1]:
                raise ValueError(f"{file} has two columns {repeated[0]!r}: rename one")
            _check_columns(header, columns, file)
            line = rows.line_num + 1
            for values in rows:
                if values:  # no blank line
                    if len(values) != len(header):
                        raise ValueError(f"{file}:{line} has {len(values)} values, and the first line {len(header)}")
                    yield Row(f"{name}:{line}", f"{file}:{line}", dict(zip(header, values)))
                line = rows.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        reason = f"UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else f"CSV ({error})"
        raise ValueError(f"{file}:{line} is not {reason}; quote values with commas or line ends") from None


def read_parquet(file: Path, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every row of a Parquet file, in batches of bounded memory."""
    need("pyarrow", "parquet")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            _check_columns(table.schema_arrow.names, columns, file)
            batches = table.iter_batches(batch_size=256, columns=list(columns) or None)
            rows = (row for batch in batches for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield Row(f"{name}:{index}", f"{file} row {index}", _without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} cannot be read as Parquet ({reason}): download or write it again") from None


def read_saved(folder: Path, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every row of a folder that `Dataset.save_to_disk` wrote."""
    need("datasets", "datasets")
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(inner.name for inner in folder.iterdir() if inner.is_dir()))
        raise ValueError(f"{folder} holds several datasets ({splits}); give the path of one of these folders")
    if (folder / "state.json").is_file() and not any(folder.glob("*.arrow")):
        raise ValueError(f"{folder} is a dataset without rows; give another path")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any class, by what of the folder is damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder} is not a folder that datasets' save_to_disk wrote ({reason})") from None
    _check_columns(dataset.column_names, columns, folder)
    for index, row in enumerate(dataset.select_columns(list(columns)) if columns else dataset):
        yield Row(str(index), f"{folder} row {index}", _without_nulls(row))


READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "datasets": read_saved,
}


def text_of(row: Row, field: str) -> bytes:
    """Return the text of a field of a row, UTF-8.

    Raises:
        ValueError: There is no such field, or it is no text.
    """
    record = parse_json(row.content, row.where) if isinstance(row.content, bytes) else row.content
    if not isinstance(record, Mapping) or not isinstance(record.get(field), str):
        found = (", ".join(map(str, record)) or "none") if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{row.where} has no text under {field!r} (found: {found}); give field=<name>")
    # JSON may escape a lone surrogate, which UTF-8 cannot encode: it becomes a question mark.
    return str(record[field]).encode(errors="replace")


def _check_columns(found: Sequence[str], wanted: Sequence[str], file: Path) -> None:
    for column in wanted:
        if column not in found:
            names = ", ".join(found) or "none"
            raise ValueError(f"{file} has no column {column!r}; give field=<one of: {names}>")


def need(package: str, format: str) -> None:
    """Raise `ValueError` unless the package that reads a format is installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"data format {format!r} needs the {package} package; pip install distopt[data]")


def _without_nulls(value: Any) -> Any:
    """Drop the nulls of a table, which gives every struct the fields of all others in its column."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
