"""Names on the Hugging Face hub in place of folders: downloaded into its cache, or found there without a network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """What a name on the hub is expected to be.

    Attributes:
        repository: The kind of repository: `model` or `dataset`.
        files: Patterns of the files that are downloaded.
        bare: Whether a name without an owner, such as gpt2, is one.
    """

    repository: str
    files: tuple[str, ...]
    bare: bool


ROWS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")  # endings of files of rows
_TOKENIZER = ("*.json", "*.model", "*.jinja", "*.txt", "*.tekken")
TOKENIZER = Kind("model", _TOKENIZER, bare=True)
MODEL = Kind("model", (*_TOKENIZER, "*.safetensors"), bare=True)
DATA = Kind("dataset", (*(f"*{ending}" for ending in ROWS), "*.txt"), bare=False)
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.][\w./-]*))?")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_COPIES = ["consolidated*", "original/*"]  # of weights, in a format of their authors
_FILES = (*ROWS, ".txt", ".md", ".py", ".arrow", ".gz", ".zip", ".zst")  # endings that no repository has
_CACHED = re.compile(r"(models|datasets)--(?P<name>.+)")


def is_name(value: str, kind: Kind) -> bool:
    """Return whether a value names a repository on the hub: OWNER/NAME, or OWNER/NAME@REVISION, and no path here.

    What begins with a folder of here is a path, and so is what ends like a file.
    """
    found = _NAME.fullmatch(value)
    if found is None or Path(value).exists() or value.endswith(_FILES):
        return False
    owner, slash, _ = found["name"].partition("/")
    return not Path(owner).is_dir() if slash else kind.bare


def folder(key: str, value: str, kind: Kind, files: Sequence[str] = ()) -> Path:
    """Return the folder of a path, or that of a name on the hub in the hub's cache, downloading what is missing.

    Only the first process of a machine downloads; the others find what is there, and may be called after it alone.

    Args:
        key: The option, for messages.
        value: A path, or a name as in `is_name`; a path is returned as it is.
        kind: What it has to be.
        files: Patterns of the files that are downloaded; those of the kind if there are none.

    Raises:
        ValueError: The name is not on the hub, needs a login, or is not in the cache while the hub cannot be reached.
    """
    if not is_name(value, kind):
        return Path(value).expanduser()
    found = _NAME.fullmatch(value)
    assert found is not None
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _snapshot(found["name"], found["revision"], kind, tuple(files) or kind.files, offline=not first)
    except Exception as error:  # of httpx, of the hub and of the file system
        raise ValueError(f"{key}={value}: no such path here, and {_reason(error, value, kind, files)}") from error


def _snapshot(name: str, revision: str | None, kind: Kind, files: tuple[str, ...], offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(
        snapshot_download(
            name,
            repo_type=kind.repository,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=_COPIES,
            local_files_only=offline,
        )
    )
    # Without a network the hub's library returns what is there, such as a tokenizer without its model.
    if (kind is MODEL and not any((folder / file).exists() for file in _WEIGHTS)) or not any(folder.iterdir()):
        raise LocalEntryNotFoundError(name)
    return folder


def listing(key: str, value: str) -> tuple[str, str, list[str]]:
    """Return the name of a dataset on the hub, its commit, and the paths of its files, of which none is downloaded.

    Args:
        key: The option, for messages.
        value: A name as in `is_name`.

    Raises:
        ValueError: The name is not on the hub, needs a login, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    found = _NAME.fullmatch(value)
    assert found is not None
    try:
        info = HfApi().dataset_info(found["name"], revision=found["revision"])
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"{key}={value}: no such path here, and {_reason(error, value, DATA, ())}") from error
    except Exception as error:  # of httpx and of the hub
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}={value}: no such path here, and a stream is read from the hub, which does not answer ({reason}): "
            f"data=text reads what `{command(value, DATA)}` downloads"
        ) from error
    return found["name"], str(info.sha), [file.rfilename for file in info.siblings or []]


def _reason(error: Exception, value: str, kind: Kind, files: Sequence[str]) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"on the hub it is open to those who have accepted its terms at {_url(value, kind)}: `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {kind.repository} of this name, or it is private: `hf auth login`"
    download = f"`{command(value, kind, files)}`"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, errors.OfflineModeIsEnabled)):
        what = "" if kind is not MODEL else "with model.safetensors "
        return f"it is not {what}in the hub's cache: run {download} where the hub can be reached"
    return f"the hub gave no such {kind.repository} ({str(error).strip().splitlines()[0]}): try {download}"


def command(value: str, kind: Kind, files: Sequence[str] = ()) -> str:
    """Return the command that downloads a name into the hub's cache."""
    name, _, revision = value.partition("@")
    return " ".join(
        [
            f"hf download {name}",
            *(["--repo-type dataset"] if kind.repository == "dataset" else []),
            *([f"--revision {revision}"] if revision else []),
            *(f"--include '{pattern}'" for pattern in files),
        ]
    )


def _url(value: str, kind: Kind) -> str:
    return f"https://huggingface.co/{'datasets/' if kind.repository == 'dataset' else ''}{value.partition('@')[0]}"


def origin(folder: Path) -> str:
    """Return where others find what a folder has: a name on the hub for a folder of its cache, else the full path."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return cached["name"].replace("--", "/") if cached else str(folder.absolute())
