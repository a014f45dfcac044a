"""Tokenization of a source into the token cache, by one process or several; an interrupted one is resumed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distopt.data import sources, tokenizers
from distopt.data.parallel import encoded
from distopt.data.token_cache import SPLITS, Split, in_validation, remove_abandoned

_BATCH = 1 << 22  # bytes tokenized in one call, so that a tokenizer can use every core
_KEPT = 16  # batches after which an interrupted build resumes
_PROGRESS, _LOCK = "progress.json", "lock"


def write(
    folder: Path, source: sources.Source, tokenizer: str | None, validation_fraction: float, processes: int = 1
) -> None:
    """Tokenize `source` into `folder` with bounded memory, unless it is there.

    A document belongs to validation if the hash of its key is below `validation_fraction`. If a split has no document
    by this rule (as with a single file), the tail of every document becomes the validation text instead.

    The folder is renamed to its name when it is complete. If the process is killed before, the next call resumes from
    what is on disk. If another process of this machine builds the same folder, this one waits for it.

    Args:
        folder: The folder to create.
        source: The text.
        tokenizer: A Hugging Face tokenizer folder; None for bytes.
        validation_fraction: The fraction of the documents used for validation, in (0, 1).
        processes: The number of processes that tokenize.

    Raises:
        ValueError: A file cannot be read, or a split has no text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    building = folder.parent / f"{folder.name}.building"
    with _alone(folder, building):
        if folder.is_dir():
            return
        try:
            _tokenize(building, source, tokenizer, validation_fraction, processes)
        except Exception:  # after a kill it stays
            shutil.rmtree(building, ignore_errors=True)
            raise
        (building / _PROGRESS).unlink(missing_ok=True)
        (building / _LOCK).unlink()
        os.replace(building, folder)


@contextlib.contextmanager
def _alone(folder: Path, building: Path) -> Iterator[None]:
    """Make the folder in which to build, and keep other processes out of it; or wait until another one is done."""
    while not folder.is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
            building.mkdir(exist_ok=True)
            with open(building / _LOCK, "a") as lock:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(lock.fileno()), (building / _LOCK).stat()):
                    yield
                    return
    yield


class _SplitFile:
    """The file of the tokens of a split, which are counted and hashed.

    Args:
        path: The file.
        dtype: The type of a token.
        tokens: The number of tokens to keep of a file that is there.
        size: The size of their text in bytes.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, size: int) -> None:
        path.touch()
        self.file, self.dtype, self.digest = path.open("r+b"), dtype, hashlib.blake2b(digest_size=16)
        self.tokens, self.bytes = tokens, size
        self.file.truncate(tokens * dtype.itemsize)
        while data := self.file.read(_BATCH):
            self.digest.update(data)

    def write(self, ids: np.ndarray, size: int) -> None:
        """Append the tokens of `size` bytes of text."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.bytes += size

    def sync(self) -> None:
        """Wait until the tokens are on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


def _tokenize(folder: Path, source: sources.Source, tokenizer: str | None, fraction: float, processes: int) -> None:
    """Write the token files of both splits and meta.json into `folder`, from where an interrupted build has ended."""
    from tqdm import tqdm

    vocabulary = tokenizers.load(tokenizer)
    separator = np.asarray(vocabulary.separator, dtype=np.uint32)
    dtype = np.min_scalar_type(vocabulary.size - 1)
    done = _progress(folder, dtype)
    with contextlib.ExitStack() as stack:
        files = {split: _SplitFile(folder / f"{split}.bin", dtype, *done[split]) for split in SPLITS}
        for split_file in files.values():
            stack.enter_context(split_file.file)
        read = sum(split_file.bytes for split_file in files.values())
        options: Any = {"total": source.size, "initial": read, "unit": "B", "unit_scale": True, "delay": 2}
        bar = stack.enter_context(tqdm(desc=f"tokenizing {source.root}", **options))
        batches = itertools.islice(_batches(_split(source, fraction)), done["batches"], None)
        # Closed here, and with it the processes, whatever happens.
        results = stack.enter_context(contextlib.closing(encoded(batches, tokenizer, processes)))
        for count, (batch, tokens) in enumerate(results, start=done["batches"] + 1):
            for (split, piece), ids in zip(batch, tokens):
                if piece:
                    files[split].write(ids, len(piece))
                else:
                    files[split].write(separator, len(separator))
                bar.update(len(piece))
            if count % _KEPT == 0:
                _keep(folder, count, files)
    meta: dict[str, Any] = {
        "source": str(source),
        "tokenizer": tokenizer,
        "vocab_size": vocabulary.size,
        "dtype": dtype.name,
    }
    for split, split_file in files.items():
        if not split_file.tokens:
            raise ValueError(f"validation_fraction={fraction} leaves no text for {split} in {source}; give more text")
        meta[split] = {
            "tokens": split_file.tokens,
            "bytes": split_file.bytes,
            "digest": split_file.digest.hexdigest(),
        }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _keep(folder: Path, batches: int, files: dict[Split, _SplitFile]) -> None:
    """Record that the tokens of so many batches are on disk."""
    for split_file in files.values():
        split_file.sync()
    done: dict[str, Any] = {
        "batches": batches,
        "of": _BATCH,
        **{split: [file.tokens, file.bytes] for split, file in files.items()},
    }
    (folder / "progress.new").write_text(json.dumps(done))
    os.replace(folder / "progress.new", folder / _PROGRESS)


def _progress(folder: Path, dtype: np.dtype) -> dict[str, Any]:
    """Return what an interrupted build has recorded; nothing done if its files are not as long as it says."""
    try:
        done: dict[str, Any] = json.loads((folder / _PROGRESS).read_text())
        if done["of"] == _BATCH and all(
            (folder / f"{split}.bin").stat().st_size >= done[split][0] * dtype.itemsize for split in SPLITS
        ):
            return done
    except (OSError, ValueError, KeyError):
        pass
    return {"batches": 0, **dict.fromkeys(SPLITS, (0, 0))}


def _split(source: sources.Source, fraction: float) -> Iterator[tuple[Split, bytes]]:
    """Yield the text as (split, piece); an empty piece ends a document."""
    validation = (in_validation(document.key, fraction) for document in source.documents())
    first = next(validation, False)
    one_sided = all(each == first for each in validation)
    for document in source.documents():
        train = 0 if in_validation(document.key, fraction) else document.size
        if one_sided:
            train = round(document.size * (1 - fraction))
        position, used = 0, set[Split]()
        for piece in document.pieces:
            boundary = sources.character_start(piece, min(max(train - position, 0), len(piece)))
            position += len(piece)
            for split, part in zip(SPLITS, (piece[:boundary], piece[boundary:])):
                if part:
                    used.add(split)
                    yield split, part
        yield from ((split, b"") for split in sorted(used))


def _batches(pieces: Iterator[tuple[Split, bytes]]) -> Iterator[list[tuple[Split, bytes]]]:
    """Group pieces into batches of at least `_BATCH` bytes."""
    batch: list[tuple[Split, bytes]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
